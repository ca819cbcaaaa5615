"""`mosaic_ampere`: x @ packed weight on GPUs of compute capability 8, by `mma` on fragments unpacked in registers.

The kernel computes `out.T = W.T @ x.T`, since the layout makes the weight the left operand. A block takes 64 or
128 outputs, a tile of tokens and a part of the inputs: `cp.async` brings words and activations through shared
memory some steps ahead, scales come straight into registers a step ahead. Codes are multiplied as integers about
zero and the product of each group is scaled in float32, so that no scale is rounded. Zero points are left to XLA:

    out = sum_g scale[g] * (sum_k code[k] x[k]) - sum_g (scale[g] * zero[g]) * (sum_k x[k]),  k in group g

Beyond `MIDDLE_TOKENS` tokens the weight is made float once and the vendor's product taken, but not of stacked
experts.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Integer

from pallas_kernels.autodiff import differentiable
from pallas_kernels.grouped import block_rows
from pallas_kernels.mosaic_gpu import compat, experts, prefill, rules, tuning
from pallas_kernels.mosaic_gpu.layout import (
    PLANES,
    TILE_K,
    TILE_N,
    WORDS,
    ShuffledWeight,
    round_up,
    shuffle,
)
from pallas_kernels.mosaic_gpu.operands import group_sums, in_row_order, swizzled
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.mosaic_gpu.unpack import load_tile, unpack_tile
from pallas_kernels.weight import PackedWeight, Problem


def check(problem: Problem) -> None:
    """Raises NotImplementedError, naming its limit, for a problem that this implementation declines."""
    compat.check(problem, (8,))


def prepare(weight: PackedWeight, x_dtype: Any) -> ShuffledWeight:
    """The weight in the layout that Hopper has too, whatever the dtype of the activations."""
    return shuffle(weight)


def run(x: Float[Array, "tokens d_in"], weight: ShuffledWeight) -> Float[Array, "tokens d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`."""
    tiling = tuning.choose(compat.device_kind(), weight.problem(x), rules.ampere)
    if tiling.regime == "prefill":
        return prefill.matmul(x, weight)
    return matmul(in_row_order(x, weight), weight, tiling)


def transposed(dy: Float[Array, "tokens d_out"], weight: ShuffledWeight) -> Float[Array, "tokens d_in"]:
    """`dy @ weight.T`, by way of the whole float weight."""
    return prefill.transposed(dy, weight)


def grouped(
    x: Float[Array, "tokens d_in"], weights: ShuffledWeight, group_sizes: Integer[Array, "experts"]
) -> Float[Array, "tokens d_out"]:
    """Rows of `x`, sorted by expert, each times its expert's weight; differentiable in `x`, and to be mapped over."""
    return differentiable(_grouped, experts.transposed, rows_apart=False)(x, (weights, group_sizes))


def _grouped(x: Float[Array, "tokens d_in"], stack: experts.Stack) -> Float[Array, "tokens d_out"]:
    weights, group_sizes = stack
    tokens, count = x.shape[0], group_sizes.shape[0]
    problem = replace(weights.problem(x), tokens=block_rows(tokens, count), experts=min(tokens, count))
    tiling = rules.ampere(problem)
    return experts.product(x, stack, tiling.tile_m, lambda rows, of_tiles: matmul(rows, weights, tiling, of_tiles))


def matmul(
    x: Float[Array, "tokens d_in"],
    weight: ShuffledWeight,
    tiling: Tiling,
    of_tiles: Int32[Array, "m_tiles"] | None = None,
) -> Float[Array, "tokens d_out"]:
    """`x @ weight` by the kernel.

    Args:
        x: bfloat16 or float16, its inputs in the order of the weight's rows.
        weight: shuffled.
        tiling: `tile_n` a multiple of 64, `tile_k` of 128.
        of_tiles: for a stacked weight, the expert of each tile of tokens; negative for a tile whose result is
            undefined.
    """
    tokens = x.shape[0]
    padding = (0, round_up(tokens, tiling.tile_m) - tokens), (0, weight.k_padded - weight.d_in)
    rows = jnp.pad(x, padding)
    out = jnp.sum(_parts(rows, weight, tiling, of_tiles), axis=0)
    sums = None if weight.zeros is None else group_sums(rows, weight, rows.shape[0])
    if of_tiles is None:
        out = _finished(out, sums, weight.scales, weight.zeros)
    else:
        of_tile = jnp.maximum(of_tiles, 0)
        grid = jax.tree.map(lambda leaf: leaf[of_tile], (weight.scales, weight.zeros))
        tiled = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, tiling.tile_m), (out, sums))
        out = jax.vmap(_finished, in_axes=(1, 1, 0, 0), out_axes=1)(*tiled, *grid).reshape(out.shape)
    return out.T[:tokens, : weight.d_out].astype(x.dtype)


def _finished(
    out: Float32[Array, "n_padded tokens"],
    sums: Float32[Array, "groups tokens"] | None,
    scales: Float[Array, "groups n_padded"],
    zeros: Float32[Array, "groups n_padded"] | None,
) -> Float32[Array, "n_padded tokens"]:
    """What the kernel leaves to XLA: the scales, where each column has one, and the zeros' term."""
    scales = scales.astype(jnp.float32)
    if scales.shape[0] == 1:
        out = out * scales.T
    if zeros is not None and sums is not None:
        out = out - jnp.matmul((scales * zeros).T, sums, precision="highest")
    return out


def _parts(
    x: Float[Array, "tokens k_padded"],
    weight: ShuffledWeight,
    tiling: Tiling,
    of_tiles: Int32[Array, "m_tiles"] | None,
) -> Float32[Array, "split_k n_padded tokens"]:
    """The product about zero of each part of the inputs; unscaled where each column has one scale."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens, dtype = x.shape[0], x.dtype
    tile_m, tile_k, split_k = tiling.tile_m, tiling.tile_k, tiling.split_k
    tiles = tile_k // TILE_K  # of the layout, in a step
    n_tiles, steps = weight.n_padded // TILE_N, weight.k_padded // tile_k
    subtiles = tiling.tile_n // TILE_N
    columns = min(weight.group_rows, TILE_K)  # of a fragment
    groups = tile_k // columns
    accumulator = plgpu.Layout.MMA_ACC(dtype)

    def block(expert: Any, x_gmem: Any, scales_gmem: Any, *refs: Any) -> None:
        *planes_gmem, out_gmem = refs
        m, part = jax.lax.axis_index("m"), jax.lax.axis_index("part")
        first = part * steps // split_k
        count: Any = steps // split_k
        if steps % split_k:
            count = (part + 1) * steps // split_k - first
        # A block that reaches beyond the outputs computes the last tile again, and stores the same again.
        n_of = [jnp.minimum(jax.lax.axis_index("n") * subtiles + sub, n_tiles - 1) for sub in range(subtiles)]

        def load_scales(step: Any) -> tuple[tuple[Any, ...], ...]:
            """The scales of a step for the rows of each thread, by subtile and group."""
            if _one_scale(weight):
                return ()
            row = (expert * steps + jnp.minimum(step, steps - 1)) * groups
            return tuple(
                tuple(
                    plgpu.load(
                        scales_gmem.at[row + group, pl.ds(n * TILE_N, TILE_N)],
                        layout=accumulator.reduce(1),
                        optimized=False,
                    )
                    for group in range(groups)
                )
                for n in n_of
            )

        def body(indices: Any, x_smem: Any, *rest: Any) -> Any:
            *planes_smem, (totals, scales) = rest
            ahead = load_scales(first + indices[0] + 1)
            totals = list(totals)
            for tile in range(tiles):
                fragments = [
                    unpack_tile(
                        load_tile(planes_smem[sub::subtiles], tile, weight.bits),
                        bits=weight.bits,
                        dtype=dtype,
                        columns=columns,
                        layout=plgpu.Layout.MMA_LHS(dtype),
                    )
                    for sub in range(subtiles)
                ]
                for part_of_tile in range(TILE_K // columns):
                    group = tile * (TILE_K // columns) + part_of_tile
                    inputs = x_smem.at[:, pl.ds(group * columns, columns)].T
                    right = plgpu.load(inputs, layout=plgpu.Layout.MMA_RHS(dtype))
                    for sub in range(subtiles):
                        left = fragments[sub][part_of_tile]
                        if _one_scale(weight):
                            totals[sub] = _mma(totals[sub], left, right)
                        else:
                            product = _mma(zero(), left, right)
                            scale = scales[sub][group].astype(jnp.float32)
                            totals[sub] += product * jax.lax.broadcast_in_dim(scale, product.shape, [0])
            return tuple(totals), ahead

        def zero() -> Any:
            return plgpu.layout_cast(jnp.zeros((TILE_N, tile_m), jnp.float32), accumulator)

        transforms = swizzled(min(columns, tile_m * tile_k // 32), dtype)  # each of four warps copies whole tiles
        x_spec = plgpu.BlockSpec((tile_m, tile_k), lambda i: (m, first + i), transforms=transforms)
        plane_specs = [
            plgpu.BlockSpec((tiles * plane_bits, WORDS), lambda i, n=n: ((expert * n_tiles + n) * steps + first + i, 0))
            for plane_bits in PLANES[weight.bits]
            for n in n_of
        ]
        totals, _ = plgpu.emit_pipeline(
            body,
            grid=(count,),
            in_specs=[x_spec, *plane_specs],
            max_concurrent_steps=min(tiling.stages, steps // split_k),
            init_carry=(tuple(zero() for _ in n_of), load_scales(first)),
        )(x_gmem, *(plane for plane in planes_gmem for _ in n_of))
        for n, total in zip(n_of, totals, strict=True):
            out_gmem.at[part, m, pl.ds(n * TILE_N, TILE_N)][...] = total

    launch = experts.of_experts(
        of_tiles,
        block,
        # Tiles apart, so that each is written as whole lines of the cache, however few its tokens.
        out_type=jax.ShapeDtypeStruct((split_k, tokens // tile_m, weight.n_padded, tile_m), jnp.float32),
        grid=(-(-n_tiles // subtiles), tokens // tile_m, split_k),
        grid_names=("n", "m", "part"),
        kernel_name="ampere",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    planes = (plane.reshape(-1, WORDS) for plane in weight.planes)
    out = launch(x, weight.scales.reshape(-1, weight.n_padded), *planes)
    return out.swapaxes(1, 2).reshape(split_k, weight.n_padded, tokens)


def _mma(
    total: Float32[Array, "64 tile_m"], left: Float[Array, "64 columns"], right: Float[Array, "columns tile_m"]
) -> Float32[Array, "64 tile_m"]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if compat.interpreting():  # which does not know the instruction
        return total + jnp.matmul(left, right, preferred_element_type=jnp.float32)
    return plgpu.mma(total, left, right)


def _one_scale(weight: ShuffledWeight) -> bool:
    return weight.group_rows == weight.k_padded
