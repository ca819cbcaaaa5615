"""`mosaic_ampere`, interpreted: everything but the instructions that unpack, multiply and copy."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import machine_code
import numpy as np
import packed_weights
import pytest

from pallas_kernels.mosaic_gpu import compat, rules, tuning
from pallas_kernels.mosaic_gpu.layout import ShuffledWeight
from pallas_kernels.mosaic_gpu.tuning import MIDDLE_TOKENS, Tiling
from pallas_kernels.weight import PackedWeight, Problem, describe

ampere = importlib.import_module("pallas_kernels.mosaic_gpu.ampere")

# Shapes of SmolLM2 and, shrunk, of Llama 2: d_in, d_out; the first three are no multiple of a tile.
SHAPES = {"smollm2_qkv": (576, 320), "smollm2_down": (1536, 64), "odd": (300, 130), "llama": (1024, 128)}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    machine_code.require_mosaic()


def packed(case: packed_weights.Case) -> PackedWeight:
    return PackedWeight(
        codes=jnp.asarray(case.codes),
        scales=jnp.asarray(case.scales),
        zeros=None if case.zeros is None else jnp.asarray(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.asarray(case.group_of_row),
        bits=case.bits,
        group_rows=case.group_rows,
        d_in=case.weight.shape[0],
    )


def assert_product(case: packed_weights.Case, tokens: int, x_dtype: str, tiling: Tiling | None = None) -> None:
    x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, case.weight.shape[0])), x_dtype)
    weight = ampere.prepare(packed(case), x.dtype)
    with compat.interpret():
        y = ampere.run(x, weight) if tiling is None else ampere.matmul(x, weight, tiling)
    assert y.dtype == x.dtype
    # The result is rounded once more than the sums in float32 are.
    packed_weights.assert_product(y, x, case, eps=float(jnp.finfo(x_dtype).eps))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_grids(bits: int, group_size: int) -> None:
    case = packed_weights.make(200, 70, bits=bits, group_size=group_size, symmetric=False, seed=bits)
    assert_product(case, 3, "bfloat16")


@pytest.mark.parametrize(("bits", "group_size"), [(2, 128), (3, -1), (4, 32), (8, 64)])
def test_symmetric_grids(bits: int, group_size: int) -> None:
    case = packed_weights.make(200, 70, bits=bits, group_size=group_size, seed=bits)
    assert_product(case, 3, "float16")


@pytest.mark.parametrize("tokens", [1, 8, 17, 40, 64, 130])
def test_tokens(tokens: int) -> None:
    case = packed_weights.make(384, 70, group_size=128, symmetric=False, seed=tokens)
    assert_product(case, tokens, "float16")


@pytest.mark.parametrize(("d_in", "d_out"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("permuted", [True, False])
def test_shapes(d_in: int, d_out: int, permuted: bool) -> None:
    case = packed_weights.make(d_in, d_out, group_size=64, permuted=permuted, seed=d_in)
    assert_product(case, 5, "bfloat16")


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(tile_m=8, tile_k=128, stages=2, split_k=3),  # 2, 3 and 3 steps
        Tiling(tile_m=16, tile_n=128, tile_k=256, stages=4, split_k=4),  # fewer steps than stages
        Tiling(tile_m=32, tile_n=128, tile_k=512, stages=1),
        Tiling(tile_m=64, tile_n=192, tile_k=1024, stages=3),  # one step
    ],
    ids=str,
)
def test_tilings(tiling: Tiling) -> None:
    case = packed_weights.make(1024, 130, group_size=32, symmetric=False, real_zeros=True)
    assert_product(case, 20, "bfloat16", tiling)


def test_a_measured_tiling_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PALLAS_KERNELS_TUNED", str(tmp_path))
    case = packed_weights.make(1024, 70, group_size=128)
    x, weight = jnp.ones((3, 1024), jnp.bfloat16), ampere.prepare(packed(case), jnp.bfloat16)
    measured = Tiling(tile_m=16, tile_k=512, stages=2, split_k=2)
    assert rules.ampere(weight.problem(x)) != measured
    tuning.record(compat.device_kind(), weight.problem(x), measured, 7.5)
    taken = []

    def matmul(x: jax.Array, weight: ShuffledWeight, tiling: Tiling) -> jax.Array:
        taken.append(tiling)
        return jnp.zeros((3, 70), x.dtype)

    monkeypatch.setattr(ampere, "matmul", matmul)
    ampere.run(x, weight)
    assert taken == [measured]


def test_many_tokens_take_the_whole_weight() -> None:
    """Its weight is rounded to the dtype of `x`, which alone is within eps of each term."""
    case = packed_weights.make(256, 72, group_size=128, symmetric=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(MIDDLE_TOKENS + 1, 256)), jnp.float16)
    y = ampere.run(x, ampere.prepare(packed(case), x.dtype))
    exact = np.asarray(x, np.float64) @ case.weight
    bound = 2.0**-10 * (np.abs(np.asarray(x, np.float64)) @ np.abs(case.weight)) + 1e-6
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound)


def test_transposed() -> None:
    case = packed_weights.make(300, 130, bits=8, group_size=32, permuted=True)
    dy = jnp.asarray(np.random.default_rng(0).normal(size=(7, 130)), jnp.float16)
    dx = ampere.transposed(dy, ampere.prepare(packed(case), dy.dtype))
    exact = np.asarray(dy, np.float64) @ case.weight.T
    bound = 2.0**-10 * (np.abs(np.asarray(dy, np.float64)) @ np.abs(case.weight.T)) + 1e-6
    np.testing.assert_array_less(np.abs(np.asarray(dx, np.float64) - exact), bound)


def test_a_second_call_of_the_same_shape_does_not_compile() -> None:
    case = packed_weights.make(256, 64, group_size=128)
    x = jnp.ones((2, 256), jnp.bfloat16)
    weight = ampere.prepare(packed(case), x.dtype)
    run = jax.jit(lambda x, weight: ampere.run(x, weight))
    with compat.interpret():
        run(x, weight)
        run(2 * x, weight)
    assert run._cache_size() == 1


# What it declines


def problem(**changes: object) -> Problem:
    case = packed(packed_weights.make(64, 8, group_size=32))
    found = describe(case, 4, jnp.bfloat16, platform="gpu")
    return Problem(**{**vars(found), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"x_dtype": "float32"}, "float32"), ({"platform": "cpu"}, "'cpu' is no GPU")]
)
def test_declines(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        ampere.check(problem(**changes))


def test_declines_groups_of_other_sizes() -> None:
    with compat.interpret(), pytest.raises(NotImplementedError, match="group_rows=20 is no multiple of 32"):
        ampere.check(problem(group_rows=20))


def test_takes_what_it_can_interpret() -> None:
    with compat.interpret():
        ampere.check(problem())
