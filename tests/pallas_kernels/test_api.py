"""What every implementation owes, and how one is chosen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from pallas_kernels import api
from pallas_kernels.api import IMPLEMENTATIONS, Implementation, explain, prepare, quantized_matmul
from pallas_kernels.weight import PackedWeight, Problem, describe

SHAPES = [  # d_in, d_out, group_size
    (1, 1, -1),
    (100, 33, 32),  # ragged group, last word not full
    (201, 5, 128),
    (77, 6, 20),  # groups that split words
]


def packed(case: packed_weights.Case) -> PackedWeight:
    return PackedWeight(
        codes=jnp.array(case.codes),
        scales=jnp.array(case.scales),
        zeros=None if case.zeros is None else jnp.array(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.array(case.group_of_row),
        bits=case.bits,
        group_rows=case.group_rows,
        d_in=case.weight.shape[0],
    )


def inputs(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def weight() -> PackedWeight:
    return packed(packed_weights.make(64, 8, group_size=32))


# The contract of every implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("d_in", "d_out", "group_size"), SHAPES)
def test_product(implementation: str, bits: int, symmetric: bool, d_in: int, d_out: int, group_size: int) -> None:
    for permuted in [False] if group_size == -1 else [False, True]:
        case = packed_weights.make(
            d_in, d_out, bits=bits, group_size=group_size, symmetric=symmetric, permuted=permuted
        )
        for tokens in (3,) if permuted else (1, 17):
            x = inputs(tokens, d_in)
            y = quantized_matmul(jnp.array(x), packed(case), implementation)
            packed_weights.assert_product(y, x, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
def test_any_number_of_tokens(implementation: str, tokens: int) -> None:
    case = packed_weights.make(201, 33, group_size=64, symmetric=False)
    x = inputs(tokens, 201)
    y = quantized_matmul(jnp.array(x), packed(case), implementation)
    assert y.shape == (tokens, 33)
    packed_weights.assert_product(y, x, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_real_zeros(implementation: str, tokens: int) -> None:
    case = packed_weights.make(100, 9, bits=3, group_size=32, symmetric=False, real_zeros=True)
    x = inputs(tokens, 100)
    packed_weights.assert_product(quantized_matmul(jnp.array(x), packed(case), implementation), x, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize("batch", [(), (1, 1), (2, 3)])
def test_leading_dimensions_and_dtype_are_kept(
    implementation: str, dtype: str, eps: float, batch: tuple[int, ...]
) -> None:
    case = packed_weights.make(96, 10, group_size=32)
    x = jnp.array(inputs(*batch, 96)).astype(dtype)
    y = quantized_matmul(x, packed(case), implementation)
    assert y.dtype == dtype
    assert y.shape == (*batch, 10)
    packed_weights.assert_product(np.asarray(y, np.float32), np.asarray(x, np.float32), case, eps=eps)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_gradient(implementation: str, tokens: int) -> None:
    case = packed_weights.make(100, 9, group_size=32, symmetric=False)
    x, out = inputs(tokens, 100), inputs(tokens, 9, seed=2)

    def loss(x: jax.Array, scales: jax.Array) -> jax.Array:
        product = quantized_matmul(x, replace(packed(case), scales=scales), implementation)
        return jnp.sum(out * product)

    to_x, to_scales = jax.grad(loss, argnums=(0, 1))(jnp.array(x), jnp.array(case.scales))
    np.testing.assert_allclose(to_x, out.astype(np.float64) @ case.weight.T, rtol=1e-4, atol=1e-4)
    groups = np.arange(100) // 32
    by_row = (x.astype(np.float64).T @ out) * case.weight / case.scales[groups]
    expected = np.stack([by_row[groups == group].sum(0) for group in range(4)])
    np.testing.assert_allclose(to_scales, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_stacked_weights_through_vmap(implementation: str, tokens: int) -> None:
    cases = [packed_weights.make(64, 8, group_size=32, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, cases))
    x = inputs(3, tokens, 64)
    y = jax.vmap(lambda x, weight: quantized_matmul(x, weight, implementation))(jnp.array(x), stacked)
    for expert, case in enumerate(cases):
        packed_weights.assert_product(y[expert], x[expert], case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prepared_once_gives_the_same(implementation: str, weight: PackedWeight) -> None:
    x = jnp.array(inputs(3, 64))
    prepared = prepare(weight, implementation)
    assert prepared.implementation == implementation
    product = jax.jit(quantized_matmul)(x, prepared)
    np.testing.assert_array_equal(product, quantized_matmul(x, weight, implementation))


# The choice


def decline(problem: Problem) -> None:
    raise NotImplementedError(f"needs d_in divisible by 128, and it is {problem.d_in}.")


def test_the_first_that_takes_the_problem_runs(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Implementation(lambda problem: None, lambda weight: weight, lambda x, weight: x[:, :8])
    table = {"picky": Implementation(decline, other.prepare, other.run), "cut": other, **IMPLEMENTATIONS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", table)
    x = jnp.array(inputs(2, 64))
    np.testing.assert_array_equal(quantized_matmul(x, weight), x[:, :8])
    assert prepare(weight).implementation == "cut"
    assert explain(describe(weight, 2, x.dtype)) == {
        "picky": "needs d_in divisible by 128, and it is 64.",
        "cut": "runs",
        "xla_tiled": "runs",
        "reference": "runs",
    }


def test_all_refusals_are_told(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Implementation(decline, lambda weight: weight, lambda x, weight: x)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"one": picky, "two": picky})
    with pytest.raises(NotImplementedError, match=r"one: needs d_in .* 64\.; two: needs d_in .* 64\."):
        quantized_matmul(jnp.array(inputs(2, 64)), weight)
    with pytest.raises(NotImplementedError, match=r"takes Problem\(tokens=None.*: two: needs"):
        prepare(weight, "two")


def test_the_tiled_path_runs_on_a_cpu_on_the_same_arrays(weight: PackedWeight) -> None:
    prepared = prepare(weight)
    assert prepared.implementation == "xla_tiled"
    assert prepared.arrays is weight


def test_a_second_call_compiles_nothing(weight: PackedWeight) -> None:
    x = jnp.array(inputs(5, 64))
    quantized_matmul(x, weight)
    compiled = api._run._cache_size()
    quantized_matmul(x + 1, packed(packed_weights.make(64, 8, group_size=32, seed=9)))
    assert api._run._cache_size() == compiled


# Bad input


def test_unknown_implementation(weight: PackedWeight) -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown: use one of \['xla_tiled', 'reference'\]"):
        quantized_matmul(jnp.ones((1, 64)), weight, "fast")


def test_weight_prepared_for_another_implementation(weight: PackedWeight) -> None:
    with pytest.raises(ValueError, match="prepared for 'reference', not for implementation='xla_tiled'"):
        quantized_matmul(jnp.ones((1, 64)), prepare(weight, "reference"), "xla_tiled")


def test_inputs_that_disagree(weight: PackedWeight) -> None:
    with pytest.raises(ValueError, match="x has 63 inputs in its last axis, but the weight has d_in=64"):
        quantized_matmul(jnp.ones((1, 63)), weight)


def test_dtype_that_is_not_supported(weight: PackedWeight) -> None:
    with pytest.raises(TypeError, match="x has dtype int32: convert it"):
        quantized_matmul(jnp.ones((1, 64), jnp.int32), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5 is not supported"),
        ({"bits": 8}, r"codes has shape \(8, 8\), but 8 bits .* need \(16, 8\)"),
        ({"group_rows": 0}, "group_rows=0 must be positive"),
        ({"group_rows": 16}, r"scales has shape \(2, 8\), .* need \(4, 8\)"),
        ({"zeros": jnp.zeros((1, 8))}, r"zeros has shape \(1, 8\)"),
        ({"group_of_row": jnp.zeros(63, jnp.int32)}, r"group_of_row has shape \(63,\)"),
        ({"codes": jnp.zeros((8, 8), jnp.int32)}, "codes are int32, not uint32"),
    ],
)
def test_arrays_that_disagree(weight: PackedWeight, change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quantized_matmul(jnp.ones((1, 64)), replace(weight, **change))  # type: ignore[arg-type]
