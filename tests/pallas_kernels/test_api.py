"""What every implementation owes, and how one is chosen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from kernel_cases import inputs, packed

from pallas_kernels import api
from pallas_kernels import weight as weight_module
from pallas_kernels.api import IMPLEMENTATIONS, Implementation, explain, prepare, quantized_matmul
from pallas_kernels.weight import PackedWeight, Problem, describe

ANYWHERE = ("xla_tiled", "reference")  # the kernels have interpreted tests of their own
SHAPES = [  # d_in, d_out, group_size
    (1, 1, -1),
    (100, 33, 32),  # ragged group, last word not full
    (201, 5, 128),
    (77, 6, 20),  # groups that split words
]


@pytest.fixture
def weight() -> PackedWeight:
    return packed(packed_weights.make(64, 8, group_size=32))


# The contract of every implementation


@pytest.mark.parametrize("implementation", ANYWHERE)
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


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
def test_any_number_of_tokens(implementation: str, tokens: int) -> None:
    case = packed_weights.make(201, 33, group_size=64, symmetric=False)
    x = inputs(tokens, 201)
    y = quantized_matmul(jnp.array(x), packed(case), implementation)
    assert y.shape == (tokens, 33)
    packed_weights.assert_product(y, x, case)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("tokens", [1, 3])
def test_real_zeros(implementation: str, tokens: int) -> None:
    case = packed_weights.make(100, 9, bits=3, group_size=32, symmetric=False, real_zeros=True)
    x = inputs(tokens, 100)
    packed_weights.assert_product(quantized_matmul(jnp.array(x), packed(case), implementation), x, case)


@pytest.mark.parametrize("implementation", ANYWHERE)
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


@pytest.mark.parametrize("implementation", ANYWHERE)
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


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("tokens", [1, 2])
def test_stacked_weights_through_vmap(implementation: str, tokens: int) -> None:
    cases = [packed_weights.make(64, 8, group_size=32, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, cases))
    x = inputs(3, tokens, 64)
    y = jax.vmap(lambda x, weight: quantized_matmul(x, weight, implementation))(jnp.array(x), stacked)
    for expert, case in enumerate(cases):
        packed_weights.assert_product(y[expert], x[expert], case)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_prepared_once_gives_the_same(implementation: str, weight: PackedWeight) -> None:
    x = jnp.array(inputs(3, 64))
    prepared = prepare(weight, implementation)
    assert prepared.implementation == implementation
    product = jax.jit(quantized_matmul)(x, prepared)
    np.testing.assert_array_equal(product, quantized_matmul(x, weight, implementation))


def test_bias_is_added_in_the_dtype_of_the_product(weight: PackedWeight) -> None:
    x, bias = jnp.array(inputs(2, 3, 64)).astype(jnp.bfloat16), jnp.arange(8.0)
    y = quantized_matmul(x, weight, bias=bias)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(quantized_matmul(x, weight), np.float32) + np.arange(8.0)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2.0**-7)


# The choice


def decline(problem: Problem) -> None:
    raise NotImplementedError(f"needs d_in divisible by 128, and it is {problem.d_in}.")


def on_a(monkeypatch: pytest.MonkeyPatch, platform: str, capability: str | None) -> None:
    """Pretend that JAX computes there."""
    for module in (api, weight_module):
        monkeypatch.setattr(module, "target", lambda: (platform, capability))


PICKY = Implementation(decline, lambda x, weight: x)
CUT = Implementation(lambda problem: None, lambda x, arrays: x[:, :8], prepare=lambda weight, dtype: weight.codes)


def test_the_first_that_takes_the_problem_runs(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"picky": PICKY, "cut": CUT, **IMPLEMENTATIONS})
    x = jnp.array(inputs(2, 64))
    np.testing.assert_array_equal(quantized_matmul(x, weight), x[:, :8])
    assert prepare(weight).implementation == "cut"
    explained = explain(describe(weight, 2, x.dtype))
    assert list(explained) == ["picky", "cut", *IMPLEMENTATIONS]
    assert explained["picky"] == "needs d_in divisible by 128, and it is 64."
    assert explained["cut"] == explained["xla_tiled"] == explained["reference"] == "runs"


def test_all_refusals_are_told(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"one": PICKY, "two": PICKY})
    with pytest.raises(NotImplementedError, match=r"one: needs d_in .* 64\.; two: needs d_in .* 64\."):
        quantized_matmul(jnp.array(inputs(2, 64)), weight)
    with pytest.raises(NotImplementedError, match=r"takes Problem\(tokens=None.*: two: needs"):
        prepare(weight, "two")


def test_declining_while_preparing_counts(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    def unequal(weight: PackedWeight, dtype: object) -> None:
        raise NotImplementedError("groups are not equal.")

    late = CUT._replace(prepare=unequal)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"late": late, **IMPLEMENTATIONS})
    assert prepare(weight).implementation == "xla_tiled"
    with pytest.raises(NotImplementedError, match=r"late: groups are not equal\."):
        prepare(weight, "late")


@pytest.mark.parametrize("shown", [["picky"], ["picky", "cut"], []])
def test_a_gpu_that_falls_back_says_so_once(
    weight: PackedWeight, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, shown: list[str]
) -> None:
    table = {"picky": PICKY, "cut": CUT, **{name: IMPLEMENTATIONS[name] for name in ANYWHERE}}
    kernels = {name: table[name] for name in shown}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {**kernels, **{name: table[name] for name in ANYWHERE}})
    monkeypatch.setattr(api, "_warned", set())
    on_a(monkeypatch, "gpu", "9.0")
    for _ in range(2):
        prepare(weight)
    if shown == ["picky"]:
        (warning,) = recwarn
        assert "through xla_tiled on this GPU, slowly: picky: needs d_in divisible by 128" in str(warning.message)
    else:  # a kernel runs, or there is none that declined
        assert not list(recwarn)
    recwarn.clear()
    on_a(monkeypatch, "cpu", None)
    monkeypatch.setattr(api, "_warned", set())
    prepare(weight)
    assert not list(recwarn)


def test_repacking_at_every_call_on_a_gpu_is_said(
    weight: PackedWeight, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"cut": CUT})
    monkeypatch.setattr(api, "_warned", set())
    on_a(monkeypatch, "gpu", "9.0")
    prepared = prepare(weight)
    quantized_matmul(jnp.ones((1, 64)), prepared)
    assert not list(recwarn)
    for _ in range(2):
        quantized_matmul(jnp.ones((1, 64)), weight)
    (warning,) = recwarn
    assert "repacked for cut at every call" in str(warning.message)


def test_kernels_decline_without_a_gpu_and_the_tiled_path_serves(weight: PackedWeight) -> None:
    explained = explain(describe(weight, 1, jnp.bfloat16))
    kernels = [name for name in explained if name.startswith("mosaic_")]
    assert all(explained[name] != "runs" for name in kernels)
    assert list(explained)[len(kernels) :] == ["xla_tiled", "reference"]
    with pytest.raises(NotImplementedError, match="mosaic_hopper: "):
        prepare(weight, "mosaic_hopper", jnp.bfloat16)


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
    with pytest.raises(ValueError, match=r"'fast' is unknown: use one of \[.*'xla_tiled', 'reference'\]"):
        quantized_matmul(jnp.ones((1, 64)), weight, "fast")


def test_weight_prepared_for_another_implementation(weight: PackedWeight) -> None:
    with pytest.raises(ValueError, match="prepared for 'reference', not for implementation='xla_tiled'"):
        quantized_matmul(jnp.ones((1, 64)), prepare(weight, "reference"), "xla_tiled")


def test_weight_prepared_for_another_device(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(weight)
    on_a(monkeypatch, "gpu", "9.0")
    with pytest.raises(ValueError, match=r"prepared for 'xla_tiled' on 'cpu', but JAX computes on 'gpu 9\.0'"):
        quantized_matmul(jnp.ones((1, 64)), prepared)
    hopper = prepare(weight)
    on_a(monkeypatch, "gpu", "8.0")
    with pytest.raises(ValueError, match=r"on 'gpu 9\.0', but JAX computes on 'gpu 8\.0': prepare it again"):
        quantized_matmul(jnp.ones((1, 64)), hopper)


def test_prepared_weight_declines_another_dtype(weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(problem: Problem) -> None:
        if problem.x_dtype == "float32":
            raise NotImplementedError("x is float32: use bfloat16.")

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"half": CUT._replace(check=check)})
    prepared = prepare(weight, x_dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"prepared for 'half', which declines .* x is float32: use"):
        quantized_matmul(jnp.ones((1, 64)), prepared)


def test_bias_that_disagrees(weight: PackedWeight) -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(7,\): pass \(8,\)"):
        quantized_matmul(jnp.ones((1, 64)), weight, bias=jnp.ones(7))


def test_stacked_weight(weight: PackedWeight) -> None:
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weight)
    with pytest.raises(ValueError, match="weight is a stack of 3: use grouped_matmul"):
        quantized_matmul(jnp.ones((3, 1, 64)), stacked)


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
