"""What only the tiled path promises: any cut into tiles, and little memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from pallas_kernels import reference, xla_tiled
from pallas_kernels.packing import packed_words
from pallas_kernels.weight import PackedWeight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("tile_bytes", [1, 1400])
def test_any_tile(bits: int, tokens: int, permuted: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_tiled, "TILE_BYTES", tile_bytes)
    case = packed_weights.make(237, 5, bits=bits, group_size=96, symmetric=False, permuted=permuted)
    weight = PackedWeight(
        codes=jnp.array(case.codes),
        scales=jnp.array(case.scales),
        zeros=jnp.array(case.zeros),
        group_of_row=jnp.array(case.group_of_row) if permuted else None,
        bits=bits,
        group_rows=96,
        d_in=237,
    )
    x = np.random.default_rng(1).normal(size=(tokens, 237)).astype(np.float32)
    packed_weights.assert_product(xla_tiled.matmul(jnp.array(x), weight), x, case)


def shapes(d_in: int, d_out: int, bits: int = 4, permuted: bool = False) -> PackedWeight:
    group_rows = 128
    groups = -(-d_in // group_rows)
    return PackedWeight(
        codes=jax.ShapeDtypeStruct((packed_words(d_in, bits), d_out), jnp.uint32),
        scales=jax.ShapeDtypeStruct((groups, d_out), jnp.float16),
        zeros=jax.ShapeDtypeStruct((groups, d_out), jnp.uint8),
        group_of_row=jax.ShapeDtypeStruct((d_in,), jnp.int32) if permuted else None,
        bits=bits,
        group_rows=group_rows,
        d_in=d_in,
    )


def temporary_bytes(function: Any, *arguments: Any) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_float_weight_is_never_whole(bits: int, tokens: int, permuted: bool) -> None:
    d_in, d_out = 2048, 4096
    x = jax.ShapeDtypeStruct((tokens, d_in), jnp.float32)
    weight = shapes(d_in, d_out, bits, permuted)
    activations = 4 * tokens * (d_in + d_out)
    allowed = xla_tiled.TILE_BYTES + 8 * activations
    assert temporary_bytes(xla_tiled.matmul, x, weight) < allowed < 4 * d_in * d_out / 8


def test_a_whole_float_weight_would_be_seen() -> None:
    x = jax.ShapeDtypeStruct((4, 2048), jnp.float32)
    assert temporary_bytes(reference.matmul, x, shapes(2048, 4096)) > 4 * 2048 * 4096 / 2


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_gradient_stores_no_float_weight(tokens: int) -> None:
    d_in, d_out = 2048, 4096
    x = jax.ShapeDtypeStruct((tokens, d_in), jnp.float32)
    gradient = jax.grad(lambda x, weight: jnp.sum(xla_tiled.matmul(x, weight) ** 2))
    allowed = 2 * xla_tiled.TILE_BYTES + 16 * 4 * tokens * (d_in + d_out)
    assert temporary_bytes(gradient, x, shapes(d_in, d_out)) < allowed < 4 * d_in * d_out / 4


@pytest.mark.parametrize("tokens", [1, 4, 256])
def test_layers_of_one_program_share_their_temporaries(tokens: int) -> None:
    layers, size = 24, 512

    def model(x: jax.Array, weights: list[PackedWeight]) -> jax.Array:
        for weight in weights:
            x = xla_tiled.matmul(x, weight)
        return x

    x = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
    used = temporary_bytes(model, x, [shapes(size, size) for _ in range(layers)])
    assert used < xla_tiled.TILE_BYTES + 6 * (4 * tokens * size)
