"""A quantized model made ready to run: weights in the layout of their kernels, products of one input in one."""

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gptq_jax.hooks.nnx import FUSED, FusedWeight, Params, kernel_of, with_kernel
from gptq_jax.matmul import Prepared, packed_weight
from gptq_jax.models.base import Architecture, Model, embed, input_groups
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels import api, sharded
from pallas_kernels.sharded import Cut
from pallas_kernels.weight import PackedWeight, concatenate, difference

HEAD = "lm_head"


def prepare(model: Model, implementation: str | None = None, *, fuse: bool = True) -> Model:
    """The model with its packed weights as they run here; do it once, and drop the model it was made from.

    Layers fed the same array (q, k and v; gate and up) become one product where their grids are the same. The
    result runs and generates, but is neither saved nor quantized.

    Of a model that is cut over a mesh, each device prepares its parts, which stay there.

    Args:
        model: a quantized model.
        implementation: a name in `pallas_kernels.api.IMPLEMENTATIONS`; None for the first that takes each weight.
        fuse: whether to make one product of those that can be.

    Raises:
        ValueError: the model holds no packed weights, or an unknown implementation; or a weight is cut inside of
            groups or packed words, or along several axes.
        NotImplementedError: the implementation declines a weight; the reason is given.
    """
    if not isinstance(model, Model):
        raise TypeError("prepare is for supplied architectures: a module of one's own runs as it is.")
    if not _is_packed(model):
        raise ValueError("the model holds no packed weights to prepare: quantize it, or load a quantized one.")
    x = jax.eval_shape(partial(embed, model.config), model.params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    mesh = _mesh_of(model.params)
    layers = [
        prepare_block(
            model.config, model.config.layer_kind(index), params, x.dtype, implementation, fuse=fuse, mesh=mesh
        )
        for index, params in enumerate(model.params["layers"])
    ]
    head = model.params["head"]
    if mesh is not None and HEAD in head and _packed(head, HEAD):  # which answers in float32
        head = with_kernel(head, HEAD, _prepared(head, [HEAD], mesh, implementation, jnp.float32))
    return replace(model, params={**model.params, "layers": layers, "head": head})


def prepare_block(
    config: Architecture,
    kind: Hashable,
    params: Params,
    x_dtype: Any,
    implementation: str | None = None,
    *,
    fuse: bool = True,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters of one block with its packed kernels prepared.

    Args:
        config: the architecture.
        kind: the block's `layer_kind`.
        params: the block's; those that are float stay as they are.
        x_dtype: the dtype of the residual stream.
        implementation: as for `prepare`.
        fuse: as for `prepare`.
        mesh: of the model, where it is cut over one.
    """
    fused = []
    for group in input_groups(config, kind):
        for paths in _alike(params, group, mesh) if fuse else [[path] for path in group if _packed(params, path)]:
            prepared = _prepared(params, paths, mesh, implementation, x_dtype)
            if len(paths) > 1:
                sizes = tuple(_weight(params, path).d_out for path in paths)
                fused.append(FusedWeight(weight=prepared, paths=tuple(paths), sizes=sizes))
            for path in paths:
                params = with_kernel(params, path, prepared if len(paths) == 1 else None)
    return {**params, FUSED: fused} if fused else params


def _prepared(
    params: Params, paths: list[str], mesh: Mesh | None, implementation: str | None, x_dtype: Any
) -> Prepared:
    """The kernels at these paths as one."""
    weights = [_weight(params, path) for path in paths]
    cut = _cut(params, paths[0], mesh)
    if cut is None:
        return api.prepare(concatenate(weights) if len(weights) > 1 else weights[0], implementation, x_dtype)
    try:
        return sharded.prepare(weights, cut, implementation, x_dtype)
    except ValueError as error:
        raise ValueError(f"{' and '.join(paths)} cannot be prepared: {error}") from error


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that an array is cut over; None where every device that has any of the model has all of it."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            return sharding.mesh  # type: ignore[return-value]
    return None


def _cut(params: Params, path: str, mesh: Mesh | None) -> Cut | None:
    """How the packed kernel at a path lies on the mesh, which the sharding of its codes says."""
    if mesh is None:
        return None
    codes = kernel_of(params, path).codes
    spec = codes.sharding.spec if isinstance(codes.sharding, NamedSharding) else ()
    cuts = {index: axes for index, axes in enumerate(spec) if axes}
    if len(cuts) > 1:
        raise ValueError(f"{path} is cut along {len(cuts)} of its axes, {spec}: a packed weight is cut along one.")
    for index, axes in cuts.items():
        by = ("outputs", "inputs", "experts")[codes.ndim - 1 - index]
        return Cut(mesh=mesh, by=by, axes=axes if isinstance(axes, tuple) else (axes,))
    return Cut(mesh=mesh)


def _is_packed(model: Model) -> bool:
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return any(isinstance(leaf, QuantizedTensor) for leaf in leaves)


def _alike(params: Params, group: tuple[str, ...], mesh: Mesh | None) -> list[list[str]]:
    """The packed layers of a group, those together whose weights can be concatenated, and are cut alike."""
    found: list[list[str]] = []
    for path in group:
        if not _packed(params, path):
            continue
        weight = _weight(params, path)
        for paths in found:
            same = _cut(params, paths[0], mesh) == _cut(params, path, mesh)
            if same and difference(_weight(params, paths[0]), weight) is None:
                paths.append(path)
                break
        else:
            found.append([path])
    return found


def _packed(params: Params, path: str) -> bool:
    return isinstance(kernel_of(params, path), QuantizedTensor)


def _weight(params: Params, path: str) -> PackedWeight:
    return packed_weight(kernel_of(params, path))
