"""The product for many tokens: the weight is made float once, and the vendor's product taken."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.layout import PLANES, TILE_N, WORDS, ShuffledWeight
from pallas_kernels.mosaic_gpu.operands import in_row_order, permuted
from pallas_kernels.mosaic_gpu.unpack import read_tile


def matmul(x: Float[Array, "tokens d_in"], weight: ShuffledWeight) -> Float[Array, "tokens d_out"]:
    """`x @ weight` in the dtype of `x`; the weight is rounded to it."""
    rows = jnp.pad(in_row_order(x, weight), ((0, 0), (0, weight.k_padded - weight.d_in)))
    return _product(rows, dequantize(weight, x.dtype), 1)[:, : weight.d_out]


def transposed(dy: Float[Array, "tokens d_out"], weight: ShuffledWeight) -> Float[Array, "tokens d_in"]:
    """`dy @ weight.T` in the dtype of `dy`; the weight is rounded to it."""
    outputs = jnp.pad(dy, ((0, 0), (0, weight.n_padded - weight.d_out)))
    dx = _product(outputs, dequantize(weight, dy.dtype), 0)[:, : weight.d_in]
    return dx if weight.permutation is None else permuted(dx, jnp.argsort(weight.permutation))


def dequantize(weight: ShuffledWeight, dtype: Any) -> Float[Array, "n_padded k_padded"]:
    """The float weight with its padding, outputs by rows, rounded once to `dtype`."""
    tiles = [
        plane.reshape(weight.n_padded // TILE_N, -1, plane_bits, WORDS)
        for plane, plane_bits in zip(weight.planes, PLANES[weight.bits], strict=True)
    ]
    codes = jax.vmap(jax.vmap(lambda *words: read_tile(words, weight.bits)))(*tiles)  # n_tile, k_tile, 64, 128
    codes = codes.swapaxes(1, 2).reshape(weight.n_padded, -1, weight.group_rows)
    values = codes.astype(jnp.float32) - 2.0 ** (weight.bits - 1)
    if weight.zeros is not None:
        values = values - weight.zeros.T[:, :, None]
    values = values * weight.scales.astype(jnp.float32).T[:, :, None]
    return values.astype(dtype).reshape(weight.n_padded, weight.k_padded)


def _product(
    x: Float[Array, "tokens left"], weight: Float[Array, "n_padded k_padded"], contracted: int
) -> Float[Array, "tokens _"]:
    # The sum is kept in float32 by the vendor's libraries whatever is asked for.
    return jax.lax.dot_general(x, weight, (((1,), (contracted,)), ((), ())), preferred_element_type=x.dtype)
