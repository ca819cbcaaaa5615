"""The definition that every kernel is tested against, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.packing import unpack
from pallas_kernels.weight import PackedWeight, Problem


def dequantize(
    codes: UInt32[Array, "words d_out"],
    scales: Float[Array, "groups d_out"],
    zeros: Shaped[Array, "groups d_out"] | None,
    group_of_row: Int32[Array, "d_in"] | None,
    *,
    bits: int,
    group_rows: int,
    d_in: int,
) -> Float[Array, "d_in d_out"]:
    """The float32 weight `(code - zero) * scale`.

    Args:
        codes: packed along the inputs.
        scales: one for each group and output.
        zeros: integer or real zero points; None for `2**(bits-1)`.
        group_of_row: the group of each input; None for `i // group_rows`.
        bits: 2, 3, 4 or 8.
        group_rows: inputs in a full group.
        d_in: inputs.
    """
    if group_of_row is None:
        group_of_row = jnp.arange(d_in, dtype=jnp.int32) // group_rows
    row_scales = scales.astype(jnp.float32)[group_of_row]
    row_zeros = 2.0 ** (bits - 1) if zeros is None else zeros.astype(jnp.float32)[group_of_row]
    return (unpack(codes, bits, d_in).astype(jnp.float32) - row_zeros) * row_scales


def dequantize_weight(weight: PackedWeight) -> Float[Array, "d_in d_out"]:
    """The float32 weight of `weight`."""
    return dequantize(
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.group_of_row,
        bits=weight.bits,
        group_rows=weight.group_rows,
        d_in=weight.d_in,
    )


def check(problem: Problem) -> None:
    """Declines nothing: this is the definition."""


def matmul(x: Float[Array, "tokens d_in"], weight: PackedWeight) -> Float[Array, "tokens d_out"]:
    """`x @ weight` by way of the whole float32 weight, summed in float32, in the dtype of `x`."""
    return jnp.matmul(x.astype(jnp.float32), dequantize_weight(weight), precision="highest").astype(x.dtype)
