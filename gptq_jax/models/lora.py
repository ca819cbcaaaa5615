"""Low-rank adapters over frozen weights, float or packed (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314).

The adapters are a pytree of their own, by the path of their layer: what is differentiated and given to optax. The
model's own weights take no part in that, and packed ones are multiplied with as they are.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from gptq_jax.hooks.low_rank import LORA, LowRank
from gptq_jax.hooks.nnx import FUSED, Params, kernel_of
from gptq_jax.matmul import Prepared, holds_prepared
from gptq_jax.models.base import Model, linear_paths
from gptq_jax.tensor import QuantizedTensor

Adapters = dict[str, LowRank]  # by the path of a layer, like "layers.3.self_attn.q_proj"


def lora(
    model: Model,
    rank: int,
    *,
    targets: str = "",
    alpha: float | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Adapters:
    """New adapters for the linear layers of a model's blocks; they change nothing until they are trained.

    `a` is drawn from a normal distribution of variance 1 / d_in, and `b` is zero.

    Args:
        model: float, quantized or prepared.
        rank: columns of `a`.
        targets: a regex that is searched in the paths of layers, like "q_proj|v_proj"; "" for all of them. Stacked
            experts have none.
        alpha: the product is scaled by `alpha / rank`; None for `2 * rank`.
        seed: of the random numbers.
        dtype: of the adapters.

    Raises:
        ValueError: a rank or alpha that is not positive, or `targets` matches no layer.
    """
    if not isinstance(model, Model):
        raise TypeError("adapters are for supplied architectures: a module of one's own has no places for them.")
    if rank < 1:
        raise ValueError(f"rank={rank} must be positive.")
    alpha = 2.0 * rank if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha} must be positive and finite.")
    shapes = _layer_shapes(model)
    found = {path: shape for path, shape in shapes.items() if re.search(targets, path)}
    if not found:
        raise ValueError(f"targets={targets!r} matches no layer: they are named like {next(iter(shapes))!r}.")
    keys = jax.random.split(jax.random.key(seed), len(found))
    return {
        path: LowRank(
            a=jax.random.normal(key, (d_in, rank), dtype) / jnp.asarray(d_in**0.5, dtype),
            b=jnp.zeros((rank, d_out), dtype),
            scale=alpha / rank,
        )
        for key, (path, (d_in, d_out)) in zip(keys, found.items(), strict=True)
    }


def with_lora(model: Model, adapters: Mapping[str, LowRank]) -> Model:
    """The model with these adapters beside its layers, in place of any it had; its own arrays are shared.

    It is called, evaluated and generates like the model, and under `jax.grad` it is differentiated in the adapters:

        loss = lambda adapters: cross_entropy(with_lora(model, adapters)(tokens), tokens)
        gradients = jax.grad(loss)(adapters)

    Raises:
        ValueError: an adapter's layer is not in the model, or has other sizes.
    """
    shapes = _layer_shapes(model)
    of_blocks: list[dict[str, LowRank]] = [{} for _ in model.params["layers"]]
    for path, added in adapters.items():
        shape = (added.a.shape[0], added.b.shape[1])
        if shapes.get(path) != shape:
            there = f"has {shapes[path]}" if path in shapes else "is not among the model's layers"
            raise ValueError(f"the adapter of {path} has d_in and d_out of {shape}, but that layer {there}.")
        _, index, inside = path.split(".", 2)
        of_blocks[int(index)][inside] = added
    layers = [
        {**without, LORA: own} if own else without
        for own, without in zip(of_blocks, map(_without, model.params["layers"]), strict=True)
    ]
    return replace(model, params={**model.params, "layers": layers})


def merge_lora(model: Model, adapters: Mapping[str, LowRank], *, dtype: DTypeLike = jnp.float32) -> Model:
    """The float model whose weights hold the adapters: dequantized, plus `scale * a @ b`, summed in float32.

    Args:
        model: float or quantized, not prepared.
        adapters: of this model.
        dtype: of the kernels.

    Raises:
        ValueError: as for `with_lora`, or the model's weights are prepared to run.
    """
    if holds_prepared(model.params):
        raise ValueError("the model's weights are prepared to run here: merge into the model it was prepared from.")

    def merged(params: Any, added: Mapping[str, LowRank], path: str) -> Any:
        if isinstance(params, dict):
            return {name: merged(child, added, f"{path}.{name}".lstrip(".")) for name, child in params.items()}
        layer, _, leaf = path.rpartition(".")
        if leaf != "kernel" or (layer not in added and not isinstance(params, QuantizedTensor)):
            return params
        wide = params.dequantize() if isinstance(params, QuantizedTensor) else params.astype(jnp.float32)
        return (wide + added[layer].weight() if layer in added else wide).astype(dtype)

    blocks = with_lora(model, adapters).params["layers"]
    layers = [merged(_without(block), block.get(LORA, {}), "") for block in blocks]
    return replace(model, params={**model.params, "layers": layers}, report=None)


def _without(block: Params) -> Params:
    return {name: value for name, value in block.items() if name != LORA}


def _layer_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """d_in and d_out of each layer of the blocks that can have an adapter."""
    found = {}
    for index, block in enumerate(model.params["layers"]):
        sizes = _fused_sizes(block)
        for path in linear_paths(model.config, model.config.layer_kind(index)):
            if (shape := sizes.get(path) or _shape(block, path)) is not None:
                found[f"layers.{index}.{path}"] = shape
    return found


def _fused_sizes(block: Params) -> dict[str, tuple[int, int]]:
    return {
        path: (fused.weight.d_in, size)
        for fused in block.get(FUSED, ())
        for path, size in zip(fused.paths, fused.sizes, strict=True)
    }


def _shape(block: Params, path: str) -> tuple[int, int] | None:
    """Of the kernel at a path; None where experts are stacked."""
    kernel: Array | QuantizedTensor | Prepared = kernel_of(block, path)
    if isinstance(kernel, Prepared):
        return None if kernel.problem.experts else (kernel.d_in, kernel.d_out)
    return None if len(kernel.shape) > 2 else (kernel.shape[0], kernel.shape[1])
