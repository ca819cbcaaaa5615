"""Products of tokens, sorted by expert, each with its own expert's weight; no float weight of all experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer, Shaped

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
    """Blocks of rows, each of one expert, in a loop: an expert's weight is made float a tile at a time."""
    return in_a_loop(x, weights, group_sizes, xla_tiled.matmul, weights.d_out)


def in_a_loop(
    x: Float[Array, "tokens n"],
    weights: Any,
    group_sizes: Integer[Array, "experts"],
    product: Callable[[Array, Any], Array],
    outputs: int,
) -> Float[Array, "tokens outputs"]:
    """`product` of blocks of rows, one after another, with their experts' weights.

    Args:
        x: sorted by expert.
        weights: a pytree of arrays, of which each has a leading axis of experts.
        group_sizes: rows of each expert.
        product: (rows of `x`, the weight of one expert) -> their results, in the dtype of `x`.
        outputs: numbers in a result.
    """
    rows = block_rows(x.shape[0], group_sizes.shape[0])
    blocks = cut(x.shape[0], group_sizes, rows)
    padded = jnp.pad(x, ((0, rows), (0, 0)))

    @jax.checkpoint
    def needed(expert: Int32[Array, ""], first: Int32[Array, ""]) -> Float[Array, "rows outputs"]:
        weight = jax.tree.map(lambda leaf: leaf[expert], weights)
        return product(jax.lax.dynamic_slice_in_dim(padded, first, rows), weight)

    def step(_: None, block: tuple[Int32[Array, ""], Int32[Array, ""]]) -> tuple[None, Float[Array, "rows outputs"]]:
        nothing = jnp.zeros((rows, outputs), x.dtype)
        return None, jax.lax.cond(block[0] >= 0, needed, lambda *_: nothing, *block)

    _, found = jax.lax.scan(step, None, (blocks.expert, blocks.first))
    return blocks.back(found.reshape(-1, outputs))


class Blocks(NamedTuple):
    """Rows, sorted by expert, in blocks of so many rows that each is of one expert.

    There are as many blocks as the groups could ever need. Rows that a block has beyond those of its expert are
    of no use: they are others' or none.

    Attributes:
        expert: of each block; -1 for a block that is not needed.
        first: the first row of each block.
        place: where each row is among the rows of all blocks.
        grouped: whether each row is in a group, not past the last.
    """

    expert: Int32[Array, "blocks"]
    first: Int32[Array, "blocks"]
    place: Int32[Array, "tokens"]
    grouped: Bool[Array, "tokens"]

    def back(self, found: Shaped[Array, "_ n"]) -> Shaped[Array, "tokens n"]:
        """From the rows of all blocks to the rows that were cut; zero for a row past the last group."""
        rows = found.at[self.place].get(mode="promise_in_bounds")
        return jnp.where(self.grouped[:, None], rows, jnp.zeros((), found.dtype))


def cut(tokens: int, group_sizes: Integer[Array, "experts"], rows: int) -> Blocks:
    """Blocks of `rows` rows of the `tokens` that the groups are of."""
    experts = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // rows)
    last_block = jnp.cumsum(blocks)
    first_block = last_block - blocks
    started = min(experts, tokens)  # groups that have a row; each needs one block more for every further `rows`
    most = started + (tokens - started) // rows

    block = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(last_block, block, side="right").astype(jnp.int32)
    own = jnp.minimum(expert, experts - 1)
    first = (ends - sizes)[own] + (block - first_block[own]) * rows

    # Back from blocks to rows: row t is the n-th of its expert, in block n // rows of it.
    row = jnp.arange(tokens, dtype=jnp.int32)
    expert_of_row = jnp.minimum(jnp.searchsorted(ends, row, side="right"), experts - 1)
    place = first_block[expert_of_row] * rows + row - (ends - sizes)[expert_of_row]
    return Blocks(
        expert=jnp.where(expert < experts, expert, -1),
        first=first,
        place=jnp.clip(place, 0, most * rows - 1),
        grouped=row < ends[-1],
    )


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
