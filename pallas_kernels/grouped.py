"""Products of tokens, sorted by expert, each with its own expert's weight; no float weight of all experts."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels import reference, xla_tiled
from pallas_kernels.weight import PackedWeight

_MOST_ROWS = 256  # of a block: more save nothing once a weight's dequantization is small beside its product


def by_ragged_dot(
    x: Float[Array, "tokens d_in"], weights: PackedWeight, group_sizes: Integer[Array, "experts"]
) -> Float[Array, "tokens d_out"]:
    """The definition, by way of every expert's float32 weight; rows past the last group are zero."""
    whole = jax.vmap(reference.dequantize_weight)(weights)
    y = jax.lax.ragged_dot(x.astype(jnp.float32), whole, group_sizes.astype(jnp.int32), precision="highest")
    return y.astype(x.dtype)


def by_blocks(
    x: Float[Array, "tokens d_in"], weights: PackedWeight, group_sizes: Integer[Array, "experts"]
) -> Float[Array, "tokens d_out"]:
    """Blocks of rows, each of one expert, in a loop: an expert's weight is made float a tile at a time.

    There are as many blocks as the groups could ever need; those that are not needed cost nothing.
    """
    tokens, experts = x.shape[0], group_sizes.shape[0]
    rows = block_rows(tokens, experts)
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // rows)
    last_block = jnp.cumsum(blocks)
    first_block = last_block - blocks
    most = tokens // rows + min(experts, tokens)
    padded = jnp.pad(x, ((0, rows), (0, 0)))

    @jax.checkpoint
    def product(block: Int32[Array, ""]) -> Float[Array, "rows d_out"]:
        expert = jnp.searchsorted(last_block, block, side="right").astype(jnp.int32)
        start = ends[expert] - sizes[expert] + (block - first_block[expert]) * rows
        weight = jax.tree.map(lambda leaf: leaf[expert], weights)
        return xla_tiled.matmul(jax.lax.dynamic_slice_in_dim(padded, start, rows), weight)

    def step(_: None, block: Int32[Array, ""]) -> tuple[None, Float[Array, "rows d_out"]]:
        nothing = jnp.zeros((rows, weights.d_out), x.dtype)
        return None, jax.lax.cond(block < last_block[-1], product, lambda _: nothing, block)

    _, found = jax.lax.scan(step, None, jnp.arange(most, dtype=jnp.int32))
    # Back from blocks to rows: row t is the n-th of its expert, in block n // rows of it.
    row = jnp.arange(tokens, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, row, side="right"), experts - 1)
    nth = row - (ends - sizes)[expert]
    place = first_block[expert] * rows + nth
    y = found.reshape(most * rows, -1)[jnp.clip(place, 0, most * rows - 1)]
    return jnp.where((row < ends[-1])[:, None], y, jnp.zeros((), y.dtype))


def block_rows(tokens: int, experts: int) -> int:
    """Rows of a block: the power of two above what an expert gets on average; one token alone is fastest."""
    average = -(-tokens // experts)
    return min(1 << (average - 1).bit_length(), _MOST_ROWS)


def check_groups(x: Any, experts: int | None, group_sizes: Any) -> None:
    """Raise ValueError or TypeError where the arguments do not describe groups of the rows of `x`."""
    if experts is None:
        raise ValueError("weight is not stacked: its arrays need a leading axis of experts (see jnp.stack).")
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}: pass [tokens, d_in], sorted by expert.")
    if group_sizes.shape != (experts,):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, but the weight has {experts} experts.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes are {group_sizes.dtype}: pass the number of rows of each expert, integers.")
