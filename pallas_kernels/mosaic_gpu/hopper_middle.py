"""The product for tens to hundreds of tokens on Hopper, bound by the tensor cores.

A block takes 64 outputs a computing warpgroup, which share a tile of tokens; another warpgroup issues the copies.
While the tensor cores multiply one fragment, the next is unpacked and scaled, in the dtype of `x`: unlike in
decoding, the weight is rounded as a dequantized one would be. With one scale a column the scale comes afterwards.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu import compat
from pallas_kernels.mosaic_gpu.experts import of_experts
from pallas_kernels.mosaic_gpu.layout import PLANES, TILE_K, TILE_N, WORDS, ShuffledWeight, round_up
from pallas_kernels.mosaic_gpu.operands import copyable, group_sums, swizzled
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.mosaic_gpu.unpack import load_tile, unpack_piece

_MEMORY_REGISTERS = 40  # of the warpgroup that copies; the others share the rest
STORED_TOKENS = 32  # written out at a time, so that shared memory is left for the stages


def middle(
    x: Float[Array, "tokens d_in"],
    weight: ShuffledWeight,
    tiling: Tiling,
    experts: Int32[Array, "m_tiles"] | None = None,
) -> Float[Array, "tokens d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`.

    Args:
        x: bfloat16 or float16, its inputs in the order of the weight's rows.
        weight: see `layout`.
        tiling: `tile_m` a multiple of 32 up to 256, `tile_n` 64, `warpgroups` 1 or 2.
        experts: for a stacked weight, that of each tile of tokens; negative for a tile whose result is undefined.
            `warpgroups` must then divide the weight's tiles of outputs.
    """
    tokens = x.shape[0]
    x = copyable(x)
    # A row for each tile of outputs: the tiles of a block's warpgroups are far apart.
    rows = [weight.k_padded // TILE_K * plane_bits for plane_bits in PLANES[weight.bits]]
    planes = [plane.reshape(-1, count, WORDS) for plane, count in zip(weight.planes, rows, strict=True)]
    operands = [x, *planes, weight.scales.reshape(-1, weight.n_padded)]
    if weight.zeros is not None:
        operands.append(weight.zeros.reshape(-1, weight.n_padded))
        if weight.group_rows == weight.k_padded:
            operands.append(group_sums(x, weight, round_up(tokens, tiling.tile_m)))
    out = _kernel(x, weight, tiling, experts)(*operands)
    if tiling.split_k > 1:
        return jnp.sum(out, axis=0)[:tokens, : weight.d_out].astype(x.dtype)
    return out[:tokens, : weight.d_out]


def _kernel(
    x: Float[Array, "tokens _"], weight: ShuffledWeight, tiling: Tiling, experts: Int32[Array, "m_tiles"] | None
) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype, bits, tile_m, tile_k, parts = x.dtype, weight.bits, tiling.tile_m, tiling.tile_k, tiling.split_k
    plane_count, steps, warpgroups = len(PLANES[bits]), weight.k_padded // tile_k, tiling.warpgroups
    one_scale = weight.group_rows == weight.k_padded
    columns = min(weight.group_rows, TILE_K // 2)  # of a fragment: two at least in a step
    groups = tile_k // weight.group_rows
    x_in_smem = swizzled(columns, dtype)
    # Sums of parts keep float32, whose tiles are stored as they are; the transposition is for 16 bits.
    out_dtype = jnp.float32 if parts > 1 else dtype

    def row_vector(ref: Any, *where: Any) -> Any:
        return plgpu.load(ref.at[where], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def block(expert: Any, x_gmem: Any, *refs: Any, out_smem: Any, staged: Any = None) -> None:
        *weight_gmem, out_gmem = refs
        grid_gmem = weight_gmem[plane_count:]
        m, n_block, part = jax.lax.axis_index("m"), jax.lax.axis_index("n"), jax.lax.axis_index("part")
        warpgroup = jax.lax.axis_index("warpgroup")
        n = n_block * warpgroups + warpgroup
        first = part * steps // parts
        count: Any = (part + 1) * steps // parts - first if steps % parts else steps // parts  # static if it can be
        own_outputs = pl.ds(warpgroup * TILE_N, TILE_N)

        def body(_: Any, x_smem: Any, *refs: Any) -> Any:
            planes, grid, total = refs[:plane_count], refs[plane_count:-1], refs[-1]
            own = [plane.at[warpgroup] for plane in planes]
            for index in range(tile_k // columns):
                tile, piece = divmod(index, TILE_K // columns)
                words = load_tile(own, tile, bits)
                layout = plgpu.Layout.WGMMA
                left = unpack_piece(words, piece, bits=bits, dtype=dtype, columns=columns, layout=layout)
                if not one_scale:
                    group = index * columns // weight.group_rows
                    scales, *zeros = (row_vector(ref, group, own_outputs).astype(dtype) for ref in grid)
                    if zeros:
                        left = left - jax.lax.broadcast_in_dim(zeros[0], left.shape, [0])
                    left = left * jax.lax.broadcast_in_dim(scales, left.shape, [0])
                if staged is not None:
                    staged.at[warpgroup][...] = left
                    plgpu.commit_smem()
                    left = staged.at[warpgroup]
                plgpu.wgmma(total, left, x_smem.at[:, pl.ds(index * columns, columns)].T)
                if staged is not None:
                    plgpu.wgmma_wait(0)
            plgpu.wgmma_wait(0)
            return total

        def finished(total: Any) -> Any:
            if not one_scale:
                return total
            # Plain loads, unlike copies, must not go beyond the outputs; what is beyond is not stored either.
            outputs = pl.ds(jnp.minimum(n, weight.n_padded // TILE_N - 1) * TILE_N, TILE_N)
            scales, *zeros_and_sums = grid_gmem
            if zeros_and_sums:
                zeros, sums = zeros_and_sums
                of_tokens = plgpu.load(
                    sums.at[0, pl.ds(m * tile_m, tile_m)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                )
                of_rows = row_vector(zeros, expert, outputs)
                wide = jax.lax.broadcast_in_dim
                of_tokens *= (part == 0).astype(jnp.float32)  # the sums are of all parts
                total = total - wide(of_rows, total.shape, [0]) * wide(of_tokens, total.shape, [1])
            scales = row_vector(scales, expert, outputs).astype(jnp.float32)
            return total * jax.lax.broadcast_in_dim(scales, total.shape, [0])

        def compute(run_pipeline: Any) -> None:
            def summed(total: Any) -> Any:
                run_pipeline(total)
                return total[...]

            total = finished(pl.run_scoped(summed, plgpu.ACC((TILE_N, tile_m), jnp.float32)))
            for chunk in range(0, tile_m, STORED_TOKENS):
                tokens = pl.ds(m * tile_m + chunk, STORED_TOKENS)
                smem = out_smem.at[warpgroup]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem.T[...] = plgpu.layout_cast(
                    total[:, chunk : chunk + STORED_TOKENS].astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                window = (tokens, pl.ds(n * TILE_N, TILE_N))
                plgpu.copy_smem_to_gmem(smem, out_gmem.at[part, *window] if parts > 1 else out_gmem.at[window])
            plgpu.wait_smem_to_gmem(0)

        specs = [plgpu.BlockSpec((tile_m, tile_k), lambda k: (m, first + k), transforms=x_in_smem)]
        for plane_bits in PLANES[bits]:
            rows = tile_k // TILE_K * plane_bits
            specs.append(
                plgpu.BlockSpec((warpgroups, rows, WORDS), lambda k: (expert * n_blocks + n_block, first + k, 0))
            )
        if not one_scale:
            of_rows = plgpu.BlockSpec((groups, warpgroups * TILE_N), lambda k: (expert * steps + first + k, n_block))
            specs += [of_rows] * len(grid_gmem)
        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(count,),
            in_specs=specs,
            max_concurrent_steps=tiling.stages,
            memory_registers=_MEMORY_REGISTERS,
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            compute_context=compute,
        )(x_gmem, *weight_gmem[: len(specs) - 1])

    m_tiles, n_blocks = -(-x.shape[0] // tile_m), -(-weight.n_padded // (TILE_N * warpgroups))
    shape = (x.shape[0], weight.n_padded)
    out_in_smem = swizzled(TILE_N // (jnp.dtype(out_dtype).itemsize // 2), out_dtype)
    scratch = {"out_smem": plgpu.SMEM((warpgroups, STORED_TOKENS, TILE_N), out_dtype, transforms=out_in_smem)}
    if compat.interpreting():  # which knows no left operand in registers
        scratch["staged"] = plgpu.SMEM((warpgroups, TILE_N, columns), dtype, transforms=x_in_smem)
    return of_experts(
        experts,
        block,
        out_type=jax.ShapeDtypeStruct((parts, *shape) if parts > 1 else shape, out_dtype),
        scratch_types=scratch,
        grid=(n_blocks, m_tiles, parts),
        grid_names=("n", "m", "part"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="hopper_middle",
    )
