"""What the kernels are given beside the weight: `x` as copies take it, and its sums over groups."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.mosaic_gpu.layout import ShuffledWeight, round_up


def in_row_order(x: Float[Array, "tokens d_in"], weight: ShuffledWeight) -> Float[Array, "tokens d_in"]:
    """`x` with its inputs in the order of the weight's rows."""
    return x if weight.permutation is None else permuted(x, weight.permutation)


def permuted(x: Float[Array, "tokens inputs"], order: Int32[Array, "inputs"]) -> Float[Array, "tokens inputs"]:
    """The columns of `x` in another order; without the bounds checks of plain indexing, which cost a kernel."""
    return x.at[:, order].get(mode="promise_in_bounds", unique_indices=True)


def copyable(x: Float[Array, "tokens d_in"]) -> Float[Array, "_ _"]:
    """`x` with zeros added until swizzled copies take it; what lies beyond these reads as zero."""
    return jnp.pad(x, ((0, whole_rows(x.shape[0]) - x.shape[0]), (0, -x.shape[1] % 64)))


def whole_rows(tokens: int) -> int:
    """Rows of an array that copies cut into tiles of eight, or take whole where there are fewer."""
    return tokens if tokens < 8 else round_up(tokens, 8)


def group_sums(
    x: Float[Array, "tokens _"], weight: ShuffledWeight, tokens_padded: int
) -> Float32[Array, "groups tokens_padded"]:
    """`sum(x)` over each group of inputs: what a zero point is multiplied with."""
    padded = jnp.pad(x, ((0, tokens_padded - x.shape[0]), (0, weight.k_padded - x.shape[1])))
    groups = padded.reshape(tokens_padded, -1, weight.group_rows)
    return jnp.sum(groups, axis=2, dtype=jnp.float32).T


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How wgmma wants rows of which it takes `columns` elements at a time in shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kinds: Any = plgpu  # mypy takes these for abstract classes
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return kinds.TilingTransform((8, swizzle // size)), kinds.SwizzleTransform(swizzle)
