"""The product for few tokens on Hopper, bound by reading the weight: `out.T = W.T @ x.T` by wgmma.

A block of one warpgroup takes 64 outputs and a part of the inputs (split-K), step by step through a pipeline
of copies; several blocks share a multiprocessor. Codes become floats in registers, exactly; the product of a
group is scaled afterwards, in float32: `total += scale * (product - zero * sum(x))`.
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


def decode(
    x: Float[Array, "tokens d_in"],
    weight: ShuffledWeight,
    tiling: Tiling,
    experts: Int32[Array, "m_tiles"] | None = None,
) -> Float[Array, "tokens d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`.

    Args:
        x: bfloat16 or float16, its inputs in the order of the weight's rows.
        weight: see `layout`.
        tiling: `tile_m` 8, 16, 32 or 64; `tile_n` 64.
        experts: for a stacked weight, that of each tile of tokens; negative for a tile whose result is undefined.
    """
    tokens = x.shape[0]
    x = copyable(x)
    operands = [x, *(plane.reshape(-1, WORDS) for plane in weight.planes), weight.scales.reshape(-1, weight.n_padded)]
    if weight.zeros is not None:
        operands += [weight.zeros.reshape(-1, weight.n_padded), group_sums(x, weight, round_up(tokens, tiling.tile_m))]
    out = _kernel(x, weight, tiling, experts)(*operands)
    if tiling.split_k > 1:
        return jnp.sum(out, axis=0)[: weight.d_out, :tokens].T.astype(x.dtype)
    return out[:tokens, : weight.d_out]


def _kernel(
    x: Float[Array, "tokens _"], weight: ShuffledWeight, tiling: Tiling, experts: Int32[Array, "m_tiles"] | None
) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype, bits, tile_m, tile_k, parts = x.dtype, weight.bits, tiling.tile_m, tiling.tile_k, tiling.split_k
    plane_count, steps, n_tiles = len(PLANES[bits]), weight.k_padded // tile_k, weight.n_padded // TILE_N
    one_scale = weight.group_rows == weight.k_padded
    columns = min(weight.group_rows, TILE_K)  # of a fragment
    # Fragments whose products are summed before they are scaled; of one scale a column, all of a step.
    together = tile_k // columns if one_scale else 1
    groups = tile_k // columns // together
    x_in_smem = swizzled(columns, dtype)

    def row_vector(ref: Any, *where: Any) -> Any:
        return plgpu.load(ref.at[where], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def token_vector(ref: Any, *where: Any) -> Any:
        return plgpu.load(ref.at[where], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def wide(values: Any, axis: int) -> Any:
        return jax.lax.broadcast_in_dim(values.astype(jnp.float32), (TILE_N, tile_m), [axis])

    def scaled(product: Any, scales: Any, zeros: Any = None, sums: Any = None) -> Any:
        if zeros is not None:
            product = product - wide(zeros, 0) * wide(sums, 1)
        return product * wide(scales, 0)

    def block(expert: Any, x_gmem: Any, *refs: Any, out_smem: Any, staged: Any = None) -> None:
        *weight_gmem, out_gmem = refs
        grid_gmem = weight_gmem[plane_count:]
        n, m, part = jax.lax.axis_index("n"), jax.lax.axis_index("m"), jax.lax.axis_index("part")
        outputs, tokens = pl.ds(n * TILE_N, TILE_N), pl.ds(m * tile_m, tile_m)
        first = part * steps // parts
        count: Any = (part + 1) * steps // parts - first if steps % parts else steps // parts  # static if it can be

        def body(_: Any, x_smem: Any, *refs: Any) -> Any:
            planes, grid, total = refs[:plane_count], refs[plane_count:-1], refs[-1]
            words = [load_tile(planes, tile, bits) for tile in range(tile_k // TILE_K)]

            def fragment(index: int) -> Any:
                tile, piece = divmod(index, TILE_K // columns)
                layout = plgpu.Layout.WGMMA
                return unpack_piece(words[tile], piece, bits=bits, dtype=dtype, columns=columns, layout=layout)

            upcoming = fragment(0)
            for group in range(groups):

                def multiply(product: Any, group: int = group, upcoming: Any = upcoming) -> Any:
                    for index in range(group * together, (group + 1) * together):
                        left, right = upcoming, x_smem.at[:, pl.ds(index * columns, columns)].T
                        if staged is not None:
                            staged[...] = left
                            plgpu.commit_smem()
                            left = staged
                        plgpu.wgmma(product, left, right)
                        if staged is not None:
                            plgpu.wgmma_wait(0)
                        if index + 1 < groups * together:  # unpacked while this one is multiplied
                            upcoming = fragment(index + 1)
                    return product[...], upcoming

                product, upcoming = pl.run_scoped(multiply, plgpu.ACC((TILE_N, tile_m), jnp.float32))
                if one_scale:
                    total += product
                else:
                    sums = [token_vector(ref, group) for ref in grid[2:]]
                    total += scaled(product, *(row_vector(ref, group) for ref in grid[:2]), *sums)
            return total

        def planes_at(k: Any) -> Any:
            return (expert * n_tiles + n) * steps + first + k, 0

        specs = [plgpu.BlockSpec((tile_m, tile_k), lambda k: (m, first + k), transforms=x_in_smem)]
        for plane_bits in PLANES[bits]:
            specs.append(plgpu.BlockSpec((tile_k // TILE_K * plane_bits, WORDS), planes_at))
        if not one_scale:
            of_rows = plgpu.BlockSpec((groups, TILE_N), lambda k: (expert * steps + first + k, n))
            of_tokens = plgpu.BlockSpec((groups, tile_m), lambda k: (first + k, m))
            specs += [of_rows, of_rows, of_tokens][: len(grid_gmem)]
        total = plgpu.emit_pipeline(
            body,
            grid=(count,),
            in_specs=specs,
            max_concurrent_steps=tiling.stages,
            init_carry=plgpu.layout_cast(jnp.zeros((TILE_N, tile_m), jnp.float32), plgpu.Layout.WGMMA),
        )(x_gmem, *weight_gmem[: len(specs) - 1])
        if one_scale:
            # The sums are of all parts.
            sums = [token_vector(ref, 0, tokens) * (part == 0).astype(jnp.float32) for ref in grid_gmem[2:]]
            total = scaled(total, *(row_vector(ref, expert, outputs) for ref in grid_gmem[:2]), *sums)
        if parts > 1:
            out_smem[...] = total
            window = out_gmem.at[part, outputs, tokens]
        else:
            out_smem.T[...] = plgpu.layout_cast(total.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            window = out_gmem.at[tokens, outputs]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, window)
        plgpu.wait_smem_to_gmem(0)

    m_tiles = -(-x.shape[0] // tile_m)
    if parts > 1:
        out = jax.ShapeDtypeStruct((parts, weight.n_padded, m_tiles * tile_m), jnp.float32)
        scratch = {"out_smem": plgpu.SMEM((TILE_N, tile_m), jnp.float32)}
    else:
        out = jax.ShapeDtypeStruct((x.shape[0], weight.n_padded), dtype)
        scratch = {"out_smem": plgpu.SMEM((tile_m, TILE_N), dtype, transforms=swizzled(TILE_N, dtype))}
    if compat.interpreting():  # which knows no left operand in registers
        scratch["staged"] = plgpu.SMEM((TILE_N, columns), dtype, transforms=x_in_smem)
    return of_experts(
        experts,
        block,
        out_type=out,
        scratch_types=scratch,
        grid=(n_tiles, m_tiles, parts),
        grid_names=("n", "m", "part"),
        kernel_name="hopper_decode",
    )
