"""The kernels for Hopper, interpreted, against float64: what is computed, not how the machine unpacks (test_unpack)."""

import itertools
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from machine_code import require_mosaic

from pallas_kernels.mosaic_gpu import compat, hopper, prefill, tuning
from pallas_kernels.mosaic_gpu.hopper_decode import decode
from pallas_kernels.mosaic_gpu.hopper_middle import middle
from pallas_kernels.mosaic_gpu.layout import ShuffledWeight
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.weight import PackedWeight, Problem

# Real shapes, those of large models with fewer of their factors: 4096 as 512 or 256, 11008 = 86*128 as 11*128.
SHAPES = {
    "llama-7b.o": (512, 256),
    "llama-7b.down": (1408, 128),
    "llama-70b.up": (1024, 448),
    "qwen-7b.gate": (896, 148),
    "smollm2.q": (576, 576),
    "smollm2.k": (576, 192),
    "smollm2.down": (1536, 144),
}
ZEROS = {"symmetric": (True, False), "integer": (False, False), "real": (False, True)}
AXES: dict[str, tuple[Any, ...]] = {
    "tokens": (1, 3, 8, 17, 64, 130),
    "shape": tuple(SHAPES),
    "bits": (4, 8, 3, 2),
    "group_size": (128, 64, 32, -1),
    "zeros": tuple(ZEROS),
    "permuted": (False, True),
    "dtype": ("bfloat16", "float16"),
}
# One shape, with a number of tokens for each of the two kernels.
GRIDS = {**AXES, "tokens": (17, 130), "shape": ("smollm2.k",)}
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def covering(axes: dict[str, tuple[Any, ...]], together: int = 2) -> list[tuple[Any, ...]]:
    """Few combinations that hold every pair of values of every two axes, or more than two at a time."""

    def held(case: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(zip(axes, case, strict=True), together))

    missing = {
        tuple(zip(names, values, strict=True))
        for names in itertools.combinations(axes, together)
        for values in itertools.product(*(axes[name] for name in names))
    }
    draw, chosen = random.Random(0), []
    while missing:
        drawn = (tuple(draw.choice(values) for values in axes.values()) for _ in range(200))
        best = max(drawn, key=lambda case: len(held(case) & missing))
        if held(best) & missing:
            chosen.append(best)
            missing -= held(best)
    return chosen


def make(
    shape: str, bits: int, group_size: int, zeros: str, permuted: bool
) -> tuple[packed_weights.Case, ShuffledWeight]:
    symmetric, real = ZEROS[zeros]
    case = packed_weights.make(
        *SHAPES[shape], bits=bits, group_size=group_size, symmetric=symmetric, real_zeros=real, permuted=permuted
    )
    packed = PackedWeight(
        codes=jnp.asarray(case.codes),
        scales=jnp.asarray(case.scales),
        zeros=None if case.zeros is None else jnp.asarray(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.asarray(case.group_of_row),
        bits=bits,
        group_rows=case.group_rows,
        d_in=SHAPES[shape][0],
    )
    return case, hopper.prepare(packed, jnp.bfloat16)


def activations(tokens: int, d_in: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, d_in)), jnp.dtype(dtype))


def assert_exact(y: jax.Array, x: jax.Array, case: packed_weights.Case) -> None:
    """Within the rounding of sums in float32 and of the result: no weight and no scale is rounded."""
    assert y.dtype == x.dtype
    packed_weights.assert_product(np.asarray(y, np.float32), np.asarray(x, np.float32), case, eps=EPSILON[x.dtype.name])


def assert_close(y: jax.Array, x: jax.Array, case: packed_weights.Case) -> None:
    """Within the rounding of the weight and its scale to the dtype of `x`."""
    assert y.dtype == x.dtype
    exact = np.asarray(x, np.float64) @ case.weight
    error = np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
    assert error < EPSILON[x.dtype.name]


def check_product(tokens: int, shape: str, bits: int, group_size: int, zeros: str, permuted: bool, dtype: str) -> None:
    require_mosaic()
    case, weight = make(shape, bits, group_size, zeros, permuted)
    x = activations(tokens, weight.d_in, dtype)
    with compat.interpret():
        y = jax.jit(hopper.run)(x, weight)
    assert y.shape == (tokens, weight.d_out)
    (assert_exact if tokens <= tuning.DECODE_TOKENS else assert_close)(y, x, case)


@pytest.mark.parametrize(tuple(AXES), covering(AXES))
def test_product(tokens: int, shape: str, bits: int, group_size: int, zeros: str, permuted: bool, dtype: str) -> None:
    check_product(tokens, shape, bits, group_size, zeros, permuted, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(tuple(GRIDS), covering(GRIDS, together=3))
def test_grids(tokens: int, shape: str, bits: int, group_size: int, zeros: str, permuted: bool, dtype: str) -> None:
    check_product(tokens, shape, bits, group_size, zeros, permuted, dtype)


@pytest.mark.parametrize(
    ("tokens", "bits", "group_size", "zeros", "tiling"),
    [
        (3, 4, 128, "symmetric", Tiling(tile_k=512, stages=2)),
        (3, 3, 32, "integer", Tiling(tile_k=256, stages=4, split_k=2)),
        (5, 8, 64, "real", Tiling(tile_k=128, stages=3, split_k=3)),  # 8 steps in parts of 2, 3 and 3
        (20, 4, -1, "integer", Tiling(tile_m=16, tile_k=512, stages=1, split_k=2)),  # two tiles of tokens
        (64, 2, 128, "real", Tiling(tile_m=64, tile_k=256, stages=2)),
    ],
)
def test_tilings_of_decode(tokens: int, bits: int, group_size: int, zeros: str, tiling: Tiling) -> None:
    require_mosaic()
    case, weight = make("llama-70b.up", bits, group_size, zeros, permuted=False)
    x = activations(tokens, weight.d_in, "bfloat16")
    with compat.interpret():
        y = jax.jit(decode, static_argnames="tiling")(x, weight, tiling=tiling)
    assert_exact(y, x, case)


@pytest.mark.parametrize(
    ("tokens", "bits", "group_size", "zeros", "tiling"),
    [
        (70, 4, 128, "symmetric", Tiling(tile_m=64, tile_k=256, stages=2, warpgroups=2)),
        (70, 3, 32, "integer", Tiling(tile_m=128, tile_k=128, stages=4, warpgroups=1)),
        (260, 4, 128, "integer", Tiling(tile_m=256, tile_k=128, stages=2, split_k=3, warpgroups=2)),
        (100, 8, -1, "real", Tiling(tile_m=128, tile_k=128, stages=2, split_k=2, warpgroups=2)),
    ],
)
def test_tilings_of_middle(tokens: int, bits: int, group_size: int, zeros: str, tiling: Tiling) -> None:
    require_mosaic()
    case, weight = make("llama-70b.up", bits, group_size, zeros, permuted=False)  # 7 tiles of outputs: one is left
    x = activations(tokens, weight.d_in, "bfloat16")
    with compat.interpret():
        y = jax.jit(middle, static_argnames="tiling")(x, weight, tiling=replace(tiling, regime="middle"))
    (assert_exact if group_size == -1 else assert_close)(y, x, case)


@pytest.mark.parametrize("bits", AXES["bits"])
@pytest.mark.parametrize(("group_size", "zeros", "permuted"), [(128, "integer", True), (-1, "symmetric", False)])
@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_prefill(bits: int, group_size: int, zeros: str, permuted: bool, dtype: str) -> None:
    case, weight = make("smollm2.k", bits, group_size, zeros, permuted)
    x = activations(40, weight.d_in, dtype)
    assert_close(jax.jit(prefill.matmul)(x, weight), x, case)
    dy = activations(9, weight.d_out, dtype)
    assert_close(jax.jit(hopper.transposed)(dy, weight), dy, case._replace(weight=case.weight.T))


def test_dequantized_weight_is_rounded_once() -> None:
    case, weight = make("smollm2.q", 4, 64, "real", permuted=True)
    found = np.asarray(prefill.dequantize(weight, jnp.float32), np.float64).T[: weight.d_in, : weight.d_out]
    np.testing.assert_allclose(found, case.weight[np.asarray(weight.permutation)], rtol=1e-5, atol=1e-5)


def test_a_second_call_does_not_trace_again() -> None:
    require_mosaic()
    _, weight = make("smollm2.k", 4, 128, "symmetric", permuted=False)
    traced = []

    @jax.jit
    def run(x: jax.Array, weight: ShuffledWeight) -> jax.Array:
        traced.append(x.shape)
        return hopper.run(x, weight)

    for seed in range(2):
        with compat.interpret():
            run(jnp.full((3, weight.d_in), seed, jnp.bfloat16), weight)
    assert len(traced) == 1


PROBLEM = Problem(
    tokens=1,
    x_dtype="bfloat16",
    d_in=4096,
    d_out=4096,
    bits=4,
    group_rows=128,
    zeros=None,
    permuted=False,
    platform="gpu",
    capability="9.0",
)


def test_what_it_takes_and_declines() -> None:
    require_mosaic()
    hopper.check(PROBLEM)
    for change, reason in (
        ({"platform": "cpu", "capability": None}, "platform 'cpu' is no GPU"),
        ({"capability": "8.0"}, r"compute capability 8\.0: it needs 9\.x"),
        ({"x_dtype": "float32"}, "activations are float32"),
        ({"group_rows": 48}, "group_rows=48 is no multiple of 32"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            hopper.check(replace(PROBLEM, **change))


def test_an_older_jax_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match=r"older than 0\.11\.2.*upgrade jax"):
        hopper.check(PROBLEM)


@pytest.mark.parametrize("bits", [4, 8])
def test_tilings_are_fitted_to_shared_memory(bits: int) -> None:
    _, weight = make("llama-70b.up", bits, 128, "integer", permuted=False)
    for tiling in (
        Tiling(tile_m=64, tile_k=512, stages=6),
        Tiling(regime="middle", tile_m=256, tile_k=256, stages=4, warpgroups=2),
        Tiling(tile_m=16, tile_k=128, stages=4, split_k=8),  # a part has one step
    ):
        found = hopper.fitted(tiling, weight, jnp.bfloat16)
        assert hopper.shared_bytes(found, weight, jnp.bfloat16) <= hopper.SHARED_BYTES
        assert weight.k_padded % found.tile_k == 0
        assert found.stages <= max(1, weight.k_padded // found.tile_k // found.split_k)
        assert (found.tile_m, found.split_k) == (tiling.tile_m, tiling.split_k)
