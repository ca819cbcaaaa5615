"""A quantized model made ready to run: weights in the layout of their kernels, products of one input in one."""

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.hooks.nnx import FUSED, FusedWeight, Params, kernel_of, with_kernel
from gptq_jax.matmul import packed_weight
from gptq_jax.models.base import Architecture, Model, embed, input_groups
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels import api
from pallas_kernels.weight import PackedWeight, concatenate, difference


def prepare(model: Model, implementation: str | None = None, *, fuse: bool = True) -> Model:
    """The model with its packed weights as they run here; do it once, and drop the model it was made from.

    Layers fed the same array (q, k and v; gate and up) become one product where their grids are the same. The
    result runs and generates, but is neither saved nor quantized.

    Args:
        model: a quantized model.
        implementation: a name in `pallas_kernels.api.IMPLEMENTATIONS`; None for the first that takes each weight.
        fuse: whether to make one product of those that can be.

    Raises:
        ValueError: the model holds no packed weights, or an unknown implementation.
        NotImplementedError: the implementation declines a weight; the reason is given.
    """
    if not isinstance(model, Model):
        raise TypeError("prepare is for supplied architectures: a module of one's own runs as it is.")
    if not _is_packed(model):
        raise ValueError("the model holds no packed weights to prepare: quantize it, or load a quantized one.")
    x = jax.eval_shape(partial(embed, model.config), model.params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    layers = [
        prepare_block(model.config, model.config.layer_kind(index), params, x.dtype, implementation, fuse=fuse)
        for index, params in enumerate(model.params["layers"])
    ]
    return replace(model, params={**model.params, "layers": layers})


def prepare_block(
    config: Architecture,
    kind: Hashable,
    params: Params,
    x_dtype: Any,
    implementation: str | None = None,
    *,
    fuse: bool = True,
) -> Params:
    """The parameters of one block with its packed kernels prepared.

    Args:
        config: the architecture.
        kind: the block's `layer_kind`.
        params: the block's; those that are float stay as they are.
        x_dtype: the dtype of the residual stream.
        implementation: as for `prepare`.
        fuse: as for `prepare`.
    """
    fused = []
    for group in input_groups(config, kind):
        for paths in _alike(params, group) if fuse else [[path] for path in group if _packed(params, path)]:
            weights = [_weight(params, path) for path in paths]
            prepared = api.prepare(concatenate(weights) if len(weights) > 1 else weights[0], implementation, x_dtype)
            if len(paths) > 1:
                sizes = tuple(weight.d_out for weight in weights)
                fused.append(FusedWeight(weight=prepared, paths=tuple(paths), sizes=sizes))
            for path in paths:
                params = with_kernel(params, path, prepared if len(paths) == 1 else None)
    return {**params, FUSED: fused} if fused else params


def _is_packed(model: Model) -> bool:
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return any(isinstance(leaf, QuantizedTensor) for leaf in leaves)


def _alike(params: Params, group: tuple[str, ...]) -> list[list[str]]:
    """The packed layers of a group, those together whose weights can be concatenated."""
    found: list[list[str]] = []
    for path in group:
        if not _packed(params, path):
            continue
        weight = _weight(params, path)
        for paths in found:
            if difference(_weight(params, paths[0]), weight) is None:
                paths.append(path)
                break
        else:
            found.append([path])
    return found


def _packed(params: Params, path: str) -> bool:
    return isinstance(kernel_of(params, path), QuantizedTensor)


def _weight(params: Params, path: str) -> PackedWeight:
    return packed_weight(kernel_of(params, path))
