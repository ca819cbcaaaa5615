"""A model's parameters as they will be once quantized: the same tree, of shapes."""

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.hooks.nnx import Params
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.base import Architecture, Model
from gptq_jax.pipeline import layer_specs
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.store import packed_layers, tree_bytes
from gptq_jax.tensor import QuantizedTensor


@lru_cache(maxsize=8)
def float_shapes(architecture: Architecture, dtype: str) -> Params:
    """The parameters of the float model in `dtype`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), architecture.abstract_params())


def quantized_shapes(architecture: Architecture, rules: SpecRules, dtype: str) -> Params:
    """What `quantize` makes of `float_shapes`: a QuantizedTensor of shapes for each kernel that a rule chooses.

    Groups are taken to keep their rows, as every order but activation order without static groups leaves them.

    Raises:
        ValueError: see `layer_specs`.
    """
    default = replace(rules.default, scale_dtype=rules.default.scale_dtype or "float16")  # as `quantize` does
    floats = float_shapes(architecture, dtype)
    specs = layer_specs(Model(architecture, floats), replace(rules, default=default))

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = specs.get(name.removesuffix(".kernel")) if name.endswith(".kernel") else None
        return shape if spec is None else packed_shape(shape.shape, spec)

    return jax.tree_util.tree_map_with_path(leaf, floats)


@lru_cache(maxsize=256)
def packed_shape(shape: tuple[int, ...], spec: QuantSpec) -> QuantizedTensor:
    """A packed kernel [*experts, d_in, d_out], of shapes: what rounding one to this grid would return."""
    kernel = jax.ShapeDtypeStruct(shape[-2:], jnp.float32)
    packed = jax.eval_shape(partial(round_to_nearest, spec=spec), kernel)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*shape[:-2], *leaf.shape), leaf.dtype), packed)


def bits_per_weight(params: Params) -> float:
    """Of the packed kernels, scales and zeros included."""
    packed = packed_layers(params).values()
    return 8 * sum(tensor.nbytes for tensor in packed) / sum(math.prod(tensor.shape) for tensor in packed)


def largest_block(params: Params) -> int:
    """Bytes of the largest block."""
    return max(tree_bytes(block) for block in params["layers"])


def has_experts(params: Params) -> bool:
    """Whether a kernel is a stack, of which a token meets some."""
    return any(len(leaf.shape) > 2 for leaf in jax.tree.leaves(params["layers"]))
