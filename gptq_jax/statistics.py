"""A method's statistics for stacked experts: each expert's of the rows routed to it, and shared ones of all tokens.

A `Method` knows one weight. Its functions are mapped over experts here, so that every method quantizes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from gptq_jax.hooks.experts import Routed
from gptq_jax.methods.base import LayerBatch, Method, Solution, Stats
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.grouped import block_rows, cut

# Rows for each input of its layer that an expert's own statistics need to be better than those of all tokens. With
# as many rows as inputs they were worse by a fifth on other tokens, with twice as many equal (docs/algorithms.md).
ROWS_PER_INPUT = 2
_LEAST_ROWS = 32  # of a chunk: with fewer, reading and writing a Hessian costs more than what is added to it
_SOLVED_BYTES = 4 * 2**20  # of the Hessians of experts that are solved side by side: more leave the caches of a CPU


class ExpertStats(NamedTuple):
    """Statistics of a layer of stacked experts.

    Attributes:
        own: of the rows that each expert saw; every array has a leading dimension of experts.
        shared: of all tokens, each once: what the likeliest of its experts was fed.
        rows: that each expert saw, without padding.
    """

    own: Stats
    shared: Stats
    rows: Int32[Array, "experts"]


def init_experts(method: Method, experts: int, d_in: int, d_out: int) -> ExpertStats:
    """Before the first batch."""
    one = method.init(d_in, d_out)
    own = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], experts, axis=0), one)
    return ExpertStats(own, one, jnp.zeros(experts, jnp.int32))


@partial(jax.jit, static_argnames="update", donate_argnums=0)
def update_experts(
    stats: ExpertStats,
    routed: Routed,
    real: Bool[Array, "tokens"],
    *,
    update: Callable[[Stats, LayerBatch], Stats],
) -> ExpertStats:
    """Add the rows of a batch, an expert's in chunks, so that the cost is that of the rows.

    Args:
        stats: donated.
        routed: the input of the layer.
        real: False for padding, whose rows become zero.
        update: the method's.
    """
    (count, _), experts = routed.rows.shape, routed.sizes.shape[0]
    real_row = real[routed.token]
    rows = jnp.where(real_row[:, None], routed.rows, jnp.zeros((), routed.rows.dtype))
    size = max(block_rows(count, experts), _LEAST_ROWS)
    chunks = cut(count, routed.sizes, size)
    ends = jnp.cumsum(routed.sizes)
    padded = jnp.pad(rows, ((0, size), (0, 0)))

    def add(index: Array, own: Stats) -> Stats:
        expert, first = chunks.expert[index], chunks.first[index]
        inside = first + jnp.arange(size, dtype=jnp.int32) < ends[expert]
        chunk = jax.lax.dynamic_slice_in_dim(padded, first, size)
        batch = LayerBatch(jnp.where(inside[:, None], chunk, jnp.zeros((), chunk.dtype)))
        added = update(jax.tree.map(lambda leaf: leaf[expert], own), batch)
        return jax.tree.map(lambda leaf, new: leaf.at[expert].set(new), own, added)

    own = jax.lax.fori_loop(0, jnp.sum(chunks.expert >= 0), add, stats.own)

    expert_of_row = jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right")
    return ExpertStats(
        own,
        update(stats.shared, LayerBatch(rows[routed.row[:, 0]])),
        stats.rows.at[expert_of_row].add(real_row.astype(jnp.int32)),
    )


@partial(jax.jit, static_argnames=("solve", "spec"))
def solve_experts(
    weights: Float[Array, "experts d_in d_out"],
    stats: ExpertStats,
    shares: Bool[Array, "experts"],
    *,
    solve: Callable[[Array, Stats, QuantSpec], QuantizedTensor | Solution],
    spec: QuantSpec,
) -> Any:
    """What the method's `solve` returns for each expert, stacked.

    Args:
        weights: float.
        stats: of these experts.
        shares: which experts take the shared statistics in place of their own.
        solve: the method's.
        spec: the grid.
    """

    def one(weight: Array, own: Stats, share: Array) -> Any:
        return solve(weight, jax.tree.map(partial(jnp.where, share), stats.shared, own), spec)

    return over_experts(one, weights, stats.own, shares)


def over_experts(function: Callable[..., Any], weights: Float[Array, "experts d_in d_out"], *others: Any) -> Any:
    """`function` of each expert's weight and others, as many experts side by side as memory and use allow."""
    experts, d_in, _ = weights.shape
    together = min(max(_SOLVED_BYTES // (4 * d_in * d_in), 1), experts)
    return jax.lax.map(lambda args: function(*args), (weights, *others), batch_size=together)
