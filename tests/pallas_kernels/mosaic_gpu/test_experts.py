"""Stacked experts in the kernels, interpreted: each row against the float64 weight of its own expert."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from kernel_cases import inputs, packed
from machine_code import require_mosaic

from pallas_kernels.api import PreparedWeight, grouped_matmul, prepare, quantized_matmul
from pallas_kernels.mosaic_gpu import compat, tuning
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.weight import PackedWeight

KERNELS = ("mosaic_hopper", "mosaic_ampere")
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(autouse=True)
def mosaic() -> None:
    require_mosaic()


def experts(count: int, d_in: int, d_out: int, **grid: Any) -> tuple[list[packed_weights.Case], PackedWeight]:
    cases = [packed_weights.make(d_in, d_out, seed=seed, **grid) for seed in range(count)]
    return cases, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, cases))


def activations(tokens: int, d_in: int, dtype: str) -> jax.Array:
    return jnp.asarray(inputs(tokens, d_in), jnp.dtype(dtype))


def product(x: jax.Array, weight: PackedWeight | PreparedWeight, sizes: Any, kernel: str | None) -> jax.Array:
    with compat.interpret():
        return grouped_matmul(x, weight, jnp.asarray(sizes), kernel)


def assert_rows(y: jax.Array, x: jax.Array, cases: list[packed_weights.Case], sizes: Any) -> None:
    """Within the rounding of sums in float32 and of the result."""
    assert y.dtype == x.dtype
    start = 0
    for case, size in zip(cases, sizes, strict=True):
        rows = slice(start, start + size)
        packed_weights.assert_product(
            np.asarray(y[rows], np.float32), np.asarray(x[rows], np.float32), case, eps=EPSILON[x.dtype.name]
        )
        start += size
    assert not np.asarray(y[start:], np.float32).any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((0, 5, 1, 17), 0),  # tiles of eight: an expert without tokens, one with three tiles
        ((9, 0, 0, 0), 0),
        ((0, 0, 0, 1), 0),
        ((1, 1, 1, 1), 0),
        ((2, 0, 3, 0), 3),  # rows past the last group
        ((0, 0, 0, 0), 2),
        ((40, 3, 0, 70), 1),  # tiles of 32
    ],
)
def test_each_row_meets_its_expert(kernel: str, sizes: tuple[int, ...], more: int) -> None:
    cases, weight = experts(4, 256, 70, group_size=128)
    x = activations(sum(sizes) + more, 256, "bfloat16")
    assert_rows(product(x, weight, sizes, kernel), x, cases, sizes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ({"bits": 4, "group_size": 64, "symmetric": False, "permuted": True}, "bfloat16"),
        ({"bits": 8, "group_size": 128, "permuted": True}, "float16"),
        ({"bits": 3, "group_size": 32, "symmetric": False, "real_zeros": True}, "float16"),
        ({"bits": 2, "group_size": -1, "symmetric": False}, "bfloat16"),
        ({"bits": 4, "group_size": -1}, "float16"),
    ],
    ids=str,
)
def test_grids(kernel: str, grid: dict[str, Any], dtype: str) -> None:
    cases, weight = experts(3, 300, 130, **grid)  # 128 * 3 and 64 * 3, padded
    x, sizes = activations(12, 300, dtype), (3, 0, 9)
    with compat.interpret():
        prepared = prepare(weight, kernel, dtype)
    assert_rows(product(x, prepared, sizes, None), x, cases, sizes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("group_size", "symmetric"), [(64, False), (-1, False), (128, True)])
@pytest.mark.parametrize("d_out", [128, 70 + 64 * 2])  # two tiles of outputs, for two warpgroups, and four less some
def test_many_tokens(kernel: str, group_size: int, symmetric: bool, d_out: int) -> None:
    """A weight may be rounded to the dtype of `x`, as a dequantized one would be."""
    cases, weight = experts(3, 256, d_out, group_size=group_size, symmetric=symmetric)
    x, sizes = activations(250, 256, "bfloat16"), (150, 0, 90)
    y = np.asarray(product(x, weight, sizes, kernel), np.float64)
    exact = np.zeros((250, d_out))
    exact[:150] = np.asarray(x[:150], np.float64) @ cases[0].weight
    exact[150:240] = np.asarray(x[150:240], np.float64) @ cases[2].weight
    for rows in (slice(0, 150), slice(150, 240)):
        assert np.linalg.norm(y[rows] - exact[rows]) < 2.0**-8 * np.linalg.norm(exact[rows])
    assert not y[240:].any()


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(tile_m=8, tile_k=128, stages=2, split_k=8),  # in four parts, of 2 steps each
        Tiling(tile_m=16, tile_k=256, stages=2),
        Tiling(regime="middle", tile_m=64, tile_k=256, stages=2, warpgroups=2),  # three tiles of outputs: of one
        Tiling(regime="prefill", tile_m=128, tile_n=128),  # for which there are no groups
    ],
    ids=str,
)
def test_tilings_of_hopper(tiling: Tiling) -> None:
    cases, weight = experts(2, 1024, 150, group_size=-1, symmetric=False)
    x, sizes = activations(11, 1024, "float16"), (2, 8)
    jax.clear_caches()
    with tuning.forced(tiling):
        y = product(x, weight, sizes, "mosaic_hopper")
    jax.clear_caches()
    assert_rows(y, x, cases, sizes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_in_x(kernel: str) -> None:
    cases, weight = experts(3, 256, 70, group_size=64, permuted=True)
    x, out = activations(13, 256, "float16"), jnp.asarray(inputs(13, 70, seed=2), jnp.float16)
    found = jax.grad(lambda x: jnp.vdot(out, product(x, prepared, (4, 0, 7), None)).astype(jnp.float32))
    with compat.interpret():
        prepared = prepare(weight, kernel, "float16")
    dx = np.asarray(found(x), np.float64)
    for rows, case in ((slice(0, 4), cases[0]), (slice(4, 11), cases[2])):
        exact = np.asarray(out[rows], np.float64) @ case.weight.T
        assert np.linalg.norm(dx[rows] - exact) < 2.0**-10 * np.linalg.norm(exact)
    assert not dx[11:].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_mapped_over_x_groups_stay_apart(kernel: str) -> None:
    cases, weight = experts(2, 128, 64, group_size=128)
    with compat.interpret():
        prepared = prepare(weight, kernel, "bfloat16")
    x, sizes = jnp.stack([activations(5, 128, "bfloat16"), activations(5, 128, "bfloat16") * 2]), (2, 3)
    y = jax.vmap(lambda x: product(x, prepared, sizes, None))(x)
    for element in range(2):
        assert_rows(y[element], x[element], cases, sizes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_prepared_stack_can_be_mapped_over(kernel: str) -> None:
    cases, weight = experts(2, 128, 64, group_size=128, permuted=True)
    x = jnp.stack([activations(3, 128, "bfloat16"), activations(3, 128, "bfloat16") * 2])
    with compat.interpret():
        y = jax.vmap(quantized_matmul)(x, prepare(weight, kernel, "bfloat16"))
    for element, case in enumerate(cases):
        assert_rows(y[element], x[element], [case], (3,))


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_sizes_compile_nothing(kernel: str) -> None:
    cases, weight = experts(3, 128, 64, group_size=128)
    with compat.interpret():
        prepared = prepare(weight, kernel, "bfloat16")
    x, traces = activations(6, 128, "bfloat16"), []

    @jax.jit
    def run(x: jax.Array, weight: PreparedWeight, sizes: jax.Array) -> jax.Array:
        traces.append(1)
        return grouped_matmul(x, weight, sizes)

    for sizes in ((6, 0, 0), (1, 2, 3), (0, 0, 2)):
        with compat.interpret():
            y = run(x, prepared, jnp.asarray(sizes))
        assert_rows(y, x, cases, sizes)
    assert len(traces) == 1


def test_uneven_groups_of_one_expert_are_declined() -> None:
    cases, _ = experts(2, 128, 64, group_size=64, permuted=True)
    cases[1] = cases[1]._replace(group_of_row=np.minimum(np.arange(128) // 60, 1).astype(np.int32))
    weight = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, cases))
    with compat.interpret(), pytest.raises(NotImplementedError, match="don't hold group_rows=64 inputs each"):
        prepare(weight, "mosaic_hopper", "bfloat16")
