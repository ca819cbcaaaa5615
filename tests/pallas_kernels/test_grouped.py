"""Stacked experts against one float64 product for each row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from kernel_cases import inputs, packed

from pallas_kernels.api import IMPLEMENTATIONS, explain, grouped_matmul, prepare
from pallas_kernels.grouped import block_rows, cut
from pallas_kernels.weight import PackedWeight, describe

ANYWHERE = ("xla_tiled", "reference")
SIZES = [
    (0, 5, 1, 17),  # an expert without tokens, blocks of several sizes
    (23, 0, 0, 0),
    (0, 0, 0, 1),
    (1, 1, 1, 1),
    (2, 0, 3, 0),  # leaves rows past the last group, where there are more tokens
]


def stack(cases):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, cases))


def experts(d_in=96, d_out=10, count=4, **grid):
    return [packed_weights.make(d_in, d_out, seed=seed, **grid) for seed in range(count)]


CASES = experts(group_size=32)


def expected(x, sizes, cases=CASES):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    y = np.zeros((x.shape[0], cases[0].weight.shape[1]))
    for row, expert in enumerate(owner):
        y[row] = x[row].astype(np.float64) @ cases[expert].weight
    return y


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("more", [0, 3])
def test_each_row_meets_its_expert(implementation, sizes, more):
    x = inputs(sum(sizes) + more, 96)
    y = grouped_matmul(jnp.array(x), stack(CASES), jnp.array(sizes), implementation)
    np.testing.assert_allclose(y, expected(x, sizes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("grid", [{"bits": 3, "symmetric": False}, {"bits": 8}, {"group_size": 40, "permuted": True}])
def test_grids(implementation, grid):
    cases = experts(100, 7, 3, **{"group_size": 32, **grid})
    x = inputs(12, 100)
    y = grouped_matmul(jnp.array(x), prepare(stack(cases), implementation), jnp.array([3, 0, 9]))
    np.testing.assert_allclose(y, expected(x, (3, 0, 9), cases), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_gradient_in_x(implementation):
    x, out, sizes = inputs(23, 96), inputs(23, 10, seed=2), (0, 5, 1, 17)
    weight = stack(CASES)
    found = jax.grad(lambda x: jnp.sum(out * grouped_matmul(x, weight, jnp.array(sizes), implementation)))(jnp.array(x))
    owner = np.repeat(np.arange(4), sizes)
    by_hand = np.stack([out[row] @ CASES[expert].weight.T for row, expert in enumerate(owner)])
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-4)


def test_other_sizes_compile_nothing_and_the_dtype_is_kept():
    traces = []

    @jax.jit
    def product(x, weight, sizes):
        traces.append(1)
        return grouped_matmul(x, weight, sizes)

    x = jnp.array(inputs(8, 96)).astype(jnp.bfloat16)
    for sizes in ((8, 0, 0, 0), (2, 2, 2, 2), (0, 0, 1, 7)):
        y = product(x, stack(CASES), jnp.array(sizes))
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(y, np.float32), expected(np.asarray(x, np.float32), sizes), rtol=2.0**-7, atol=2.0**-5
        )
    assert len(traces) == 1


def test_the_float_weights_of_all_experts_never_exist():
    d_in, d_out, count, tokens = 512, 1024, 16, 32
    weight = PackedWeight(
        codes=jax.ShapeDtypeStruct((count, d_in // 8, d_out), jnp.uint32),
        scales=jax.ShapeDtypeStruct((count, d_in // 128, d_out), jnp.float16),
        bits=4,
        group_rows=128,
        d_in=d_in,
    )
    x = jax.ShapeDtypeStruct((tokens, d_in), jnp.float32)
    sizes = jax.ShapeDtypeStruct((count,), jnp.int32)

    def temporary_bytes(implementation):
        run = jax.jit(lambda *args: grouped_matmul(*args, implementation))
        return run.lower(x, weight, sizes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("xla_tiled") < 2 * 4 * d_in * d_out  # one expert is 4 * d_in * d_out
    assert temporary_bytes("reference") > count * 4 * d_in * d_out


def test_blocks_grow_with_the_tokens_of_an_expert():
    assert [block_rows(tokens, 8) for tokens in (1, 8, 9, 64, 100000)] == [1, 1, 2, 8, 256]


def test_no_tokens():
    assert grouped_matmul(jnp.ones((0, 96)), stack(CASES), jnp.zeros(4, jnp.int32)).shape == (0, 10)


def test_blocks_of_one_expert_each():
    blocks = cut(9, jnp.array([3, 0, 4]), 2)
    # Three groups that have a row, and one block for each two of the other six rows.
    np.testing.assert_array_equal(blocks.expert, [0, 0, 2, 2, -1, -1])
    np.testing.assert_array_equal(blocks.first[:4], [0, 2, 3, 5])
    np.testing.assert_array_equal(blocks.place[:7], [0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_array_equal(blocks.grouped, np.arange(9) < 7)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_there_are_always_enough_blocks(rows):
    for sizes in itertools.product(range(4), repeat=3):
        tokens = sum(sizes)
        if tokens:
            blocks = cut(tokens, jnp.array(sizes), rows)
            assert int(jnp.sum(blocks.expert >= 0)) == sum(-(-size // rows) for size in sizes)


def test_an_implementation_without_a_grouped_form_says_so(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "xla_tiled", IMPLEMENTATIONS["xla_tiled"]._replace(grouped=None))
    explained = explain(describe(stack(CASES), 8, jnp.bfloat16, "gpu"))
    assert explained["xla_tiled"] == "has no grouped kernel for 4 stacked experts."
    assert not any("grouped" in answer for name, answer in explained.items() if name != "xla_tiled")


@pytest.mark.parametrize(
    ("x", "sizes", "error", "message"),
    [
        ((2, 5, 96), jnp.ones(4, jnp.int32), ValueError, r"x has shape \(2, 5, 96\): pass \[tokens, d_in\]"),
        ((5, 96), jnp.ones(3, jnp.int32), ValueError, r"group_sizes has shape \(3,\), but the weight has 4 experts"),
        ((5, 96), jnp.ones(4), TypeError, "group_sizes are float32: pass the number of rows"),
        ((5, 95), jnp.ones(4, jnp.int32), ValueError, "x has 95 inputs"),
    ],
)
def test_arguments_that_disagree(x, sizes, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(jnp.ones(x), stack(CASES), sizes)


def test_a_single_weight_is_no_stack():
    with pytest.raises(ValueError, match="weight is not stacked: its arrays need a leading axis"):
        grouped_matmul(jnp.ones((5, 96)), packed(CASES[0]), jnp.array([5]))
