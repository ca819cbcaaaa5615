"""Stacked experts in the kernels for one weight: each tile of tokens is of one expert.

The arrays of a stack lie one after another, and a block finds its part by the expert of its tile, which it reads
first. How many tiles there are is fixed before the groups' sizes are known; the blocks of those that are not needed
end at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels.grouped import cut, in_a_loop
from pallas_kernels.mosaic_gpu import prefill
from pallas_kernels.mosaic_gpu.layout import ShuffledWeight
from pallas_kernels.mosaic_gpu.operands import permuted

Stack = tuple[ShuffledWeight, Integer[Array, "experts"]]  # and the rows of each


def product(
    x: Float[Array, "tokens d_in"],
    stack: Stack,
    tile_m: int,
    kernel: Callable[[Array, Array], Array],
) -> Float[Array, "tokens d_out"]:
    """Rows of `x`, sorted by expert, each times its expert's weight.

    Args:
        x: its inputs in their own order.
        stack: the weights and the rows of each.
        tile_m: tokens of a tile.
        kernel: (x [tiles * tile_m, d_in] in the order of the weights' rows, the expert of each tile, -1 for one that
            is not needed) -> [tiles * tile_m, d_out].
    """
    weights, group_sizes = stack
    tiles = cut(x.shape[0], group_sizes, tile_m)
    rows = x.at[tiles.first[:, None] + jnp.arange(tile_m)[None]].get(mode="clip")  # tile, tile_m, d_in
    if weights.permutation is not None:
        rows = jax.vmap(permuted)(rows, weights.permutation[jnp.maximum(tiles.expert, 0)])
    return tiles.back(kernel(rows.reshape(-1, weights.d_in), tiles.expert))


def transposed(dy: Float[Array, "tokens d_out"], stack: Stack) -> Float[Array, "tokens d_in"]:
    """Rows of `dy`, sorted by expert, each times its expert's transposed weight; one float weight at a time."""
    weights, group_sizes = stack
    return in_a_loop(dy, weights, group_sizes, prefill.transposed, weights.d_in)


def of_experts(
    experts: Int32[Array, "m_tiles"] | None, block: Callable[..., None], **launch: Any
) -> Callable[..., Float[Array, "..."]]:
    """A launch of `block(expert, *operands, **scratch)`, given the operands.

    Args:
        experts: of each index of the grid's axis `m`; a block of a negative one does nothing. None for one weight,
            which is expert 0.
        block: what each block of the grid does.
        launch: of `plgpu.kernel`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if experts is None:
        return plgpu.kernel(partial(block, 0), **launch)

    def kernel(experts_gmem: Any, *refs: Any, **scratch: Any) -> None:
        expert = experts_gmem[jax.lax.axis_index("m")]
        pl.when(expert >= 0)(lambda: block(expert, *refs, **scratch))

    return partial(plgpu.kernel(kernel, **launch), experts)
