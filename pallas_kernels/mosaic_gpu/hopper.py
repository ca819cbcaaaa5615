"""`mosaic_hopper`: x @ packed weight on GPUs of compute capability 9; one kernel for few tokens, one for some."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from pallas_kernels.autodiff import differentiable
from pallas_kernels.grouped import block_rows
from pallas_kernels.mosaic_gpu import compat, experts, prefill, rules, tuning
from pallas_kernels.mosaic_gpu.hopper_decode import decode
from pallas_kernels.mosaic_gpu.hopper_middle import STORED_TOKENS, middle
from pallas_kernels.mosaic_gpu.layout import TILE_N, ShuffledWeight, shuffle
from pallas_kernels.mosaic_gpu.operands import in_row_order
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.weight import PackedWeight, Problem

SHARED_BYTES = 232448 - 1024  # of a block, less what barriers take
_STAGES = 4  # where parts are long enough


def check(problem: Problem) -> None:
    """Raises NotImplementedError, naming its limit, for a problem that this implementation declines."""
    compat.check(problem, (9,))


def prepare(weight: PackedWeight, x_dtype: Any) -> ShuffledWeight:
    """The weight in the pre-shuffled layout, whatever the dtype of the activations."""
    return shuffle(weight)


def run(x: Float[Array, "tokens d_in"], weight: ShuffledWeight) -> Float[Array, "tokens d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`, by the kernel for as many tokens."""
    tiling = tuning.choose(compat.device_kind(), weight.problem(x), rules.hopper)
    if tiling.regime == "prefill":
        return prefill.matmul(x, weight)
    kernel = decode if tiling.regime == "decode" else middle
    return kernel(in_row_order(x, weight), weight, fitted(tiling, weight, x.dtype))


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
    tiling = fitted(_grouped_tiling(x, weights, group_sizes.shape[0]), weights, x.dtype)
    kernel = decode if tiling.regime == "decode" else middle
    return experts.product(x, stack, tiling.tile_m, lambda rows, of_tiles: kernel(rows, weights, tiling, of_tiles))


def _grouped_tiling(x: Float[Array, "tokens d_in"], weights: ShuffledWeight, count: int) -> Tiling:
    """That of an expert's average share of the tokens, but for parts and warpgroups."""
    problem = replace(weights.problem(x), tokens=block_rows(x.shape[0], count))
    tiling = tuning.choose(compat.device_kind(), problem, rules.hopper)
    if tiling.regime == "prefill":
        tiling = rules.hopper(problem)
    # Other experts' blocks fill the card too, so that parts can be longer, and no block is of two experts.
    split_k = -(-tiling.split_k // min(count, x.shape[0]))
    stages = tiling.stages if split_k == tiling.split_k else max(tiling.stages, _STAGES)
    return replace(
        tiling,
        split_k=split_k,
        stages=stages,
        warpgroups=math.gcd(tiling.warpgroups, weights.n_padded // TILE_N),
    )


def fitted(tiling: Tiling, weight: ShuffledWeight, x_dtype: Any) -> Tiling:
    """`tiling` with as many stages, and steps as long, as shared memory and the parts of the inputs allow."""
    while True:
        steps = weight.k_padded // tiling.tile_k // tiling.split_k
        tiling = replace(tiling, stages=max(1, min(tiling.stages, steps)))
        if shared_bytes(tiling, weight, x_dtype) <= SHARED_BYTES or tiling.stages == 1:
            return tiling
        if tiling.stages == 2 and tiling.tile_k % 256 == 0:
            tiling = replace(tiling, tile_k=tiling.tile_k // 2, stages=4)
        else:
            tiling = replace(tiling, stages=tiling.stages - 1)


def shared_bytes(tiling: Tiling, weight: ShuffledWeight, x_dtype: Any) -> int:
    """The shared memory that a block needs, but for barriers."""
    outputs = TILE_N * tiling.warpgroups
    stage = tiling.tile_k * (tiling.tile_m * jnp.dtype(x_dtype).itemsize + outputs * weight.bits // 8)
    if weight.group_rows < weight.k_padded:
        of_group = outputs * weight.scales.dtype.itemsize
        if weight.zeros is not None:
            of_group += 4 * outputs + 4 * tiling.tile_m
        stage += tiling.tile_k // weight.group_rows * of_group
    stored = tiling.tile_m if tiling.regime == "decode" else STORED_TOKENS
    return tiling.stages * stage + stored * outputs * (2 if tiling.split_k == 1 else 4)
