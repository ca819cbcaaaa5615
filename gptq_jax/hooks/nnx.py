"""Capture the inputs of an NNX module's linear layers, and run quantized ones in their place.

Both replace submodules of a copy that lives only while a function is traced, so any module made of
`nnx.Linear` works unchanged and nothing is patched for anybody else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptq_jax.hooks.experts import ExpertLinear, QuantizedExpertLinear, Routed, is_stacked
from gptq_jax.hooks.low_rank import LORA, LowRankLinear
from gptq_jax.matmul import Prepared, fused_grouped_matmul, fused_matmul, is_packed, matmul
from gptq_jax.tensor import QuantizedTensor

Params = dict[str, Any]  # nested dicts: names of submodules, then of arrays or QuantizedTensors
Input = Array | Routed  # of a linear layer: [*batch, d_in], or the rows of experts
FUSED = "fused"  # the name, beside a module's submodules, of a list of FusedWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class FusedWeight:
    """The kernels of linear layers that are fed the same array, as one.

    Attributes:
        weight: their outputs side by side.
        paths: the layers, dotted. Static.
        sizes: outputs of each. Static.
    """

    weight: Prepared
    paths: tuple[str, ...] = field(metadata={"static": True})
    sizes: tuple[int, ...] = field(metadata={"static": True})


class QuantizedLinear(nnx.Module):
    """`nnx.Linear` on a packed kernel."""

    def __init__(self, kernel: QuantizedTensor | Prepared, bias: Float[Array, "d_out"] | None):
        self.kernel = nnx.data(kernel)
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """`x @ kernel + bias`, in the dtype of `x`."""
        return matmul(x, self.kernel, bias=self.bias)


class _SharedProduct:
    """A product that several layers take parts of: computed when the first of them is called."""

    def __init__(self, fused: FusedWeight):
        self.weight, self.sizes = fused.weight, fused.sizes
        self.x: Input | None = None
        self.parts: list[Array] = []

    def part(self, x: Input, index: int) -> Input:
        if self.x is not x:
            if isinstance(x, Routed):
                parts = fused_grouped_matmul(x.rows, self.weight, x.sizes, self.sizes)
            else:
                parts = fused_matmul(x, self.weight, self.sizes)
            self.x, self.parts = x, parts
        return x._replace(rows=self.parts[index]) if isinstance(x, Routed) else self.parts[index]


class FusedLinear(nnx.Module):
    """One of the layers of a FusedWeight."""

    def __init__(self, product: _SharedProduct, index: int, bias: Float[Array, "d_out"] | None):
        self.product = product
        self.index = index
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "*batch d_in"] | Routed) -> Float[Array, "*batch d_out"] | Routed:
        """`x @ kernel + bias`, in the dtype of `x`."""
        y = self.product.part(x, self.index)
        if self.bias is None or isinstance(y, Routed):
            return y
        return y + jnp.expand_dims(self.bias.astype(y.dtype), range(y.ndim - 1))


LINEAR = (nnx.Linear, ExpertLinear, QuantizedLinear, QuantizedExpertLinear, FusedLinear)


class _Tap:
    """Stands for a layer: keeps the input it is called with, or calls it with one that is known already."""

    def __init__(self, layer: nnx.Module, path: str, tape: dict[str, Input], known: Input | None):
        self.layer, self.path, self.tape, self.known = layer, path, tape, known

    def __call__(self, x: Input) -> Input:
        if self.path in self.tape:
            raise NotImplementedError(
                f"layer {self.path!r} is called twice in a forward pass: one of its inputs would be lost."
            )
        self.tape[self.path] = x if self.known is None else self.known
        return self.layer(self.tape[self.path])  # type: ignore[operator]


def parameters(module: nnx.Module) -> Params:
    """The parameters of `module` by name; shapes where the module is abstract.

    The elements of an `nnx.List` are named "0", "1", ...
    """

    def named(tree: Any) -> Any:
        return {str(name): named(child) for name, child in tree.items()} if isinstance(tree, dict) else tree

    return named(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def bind(abstract: nnx.Module, params: Params) -> nnx.Module:
    """A copy of `abstract` that holds `params`.

    Args:
        abstract: a module of shapes, from `nnx.eval_shape`.
        params: its arrays by name; where a linear layer's kernel is a QuantizedTensor or prepared, a
            QuantizedLinear or QuantizedExpertLinear takes its place, and FusedLinears that of the layers of
            each FusedWeight in `params["fused"]`; a LowRankLinear that of each layer in `params["lora"]`.
    """
    module = nnx.merge(*nnx.split(abstract))
    own = {name: value for name, value in params.items() if name not in (FUSED, LORA)}
    _fill(module, own)
    for fused in params.get(FUSED, ()):
        product = _SharedProduct(fused)
        for index, path in enumerate(fused.paths):
            *parents, name = path.split(".")
            parent, here = _descend(module, own, parents)
            setattr(parent, name, FusedLinear(product, index, here.get(name, {}).get("bias")))
    for path, added in params.get(LORA, {}).items():
        *parents, name = path.split(".")
        parent, _ = _descend(module, own, parents)
        setattr(parent, name, LowRankLinear(getattr(parent, name), added))
    return module


def _descend(module: Any, params: Params, path: list[str]) -> tuple[Any, Params]:
    for name in path:
        module, params = getattr(module, name), params.get(name, {})
    return module, params


def _fill(module: Any, params: Params) -> None:
    for name, value in params.items():
        if not hasattr(module, name):
            raise ValueError(f"parameter {name!r} has no place in {type(module).__name__}.")
        if not isinstance(value, dict):
            setattr(module, name, nnx.Param(value))
        elif is_packed(value.get("kernel")):
            kernel = value["kernel"]
            packed = QuantizedExpertLinear(kernel) if is_stacked(kernel) else QuantizedLinear(kernel, value.get("bias"))
            setattr(module, name, packed)
        else:
            _fill(getattr(module, name), value)


def kernel_of(params: Params, path: str) -> Any:
    """The kernel of the layer at a dotted path."""
    for name in path.split("."):
        params = params[name]
    return params["kernel"]


def with_kernel(params: Params, path: str, kernel: Any) -> Params:
    """`params` with another kernel in the layer at a dotted path; without any where it is None."""
    name, _, rest = path.partition(".")
    layer = params[name]
    if rest:
        changed = with_kernel(layer, rest, kernel)
    else:
        changed = {key: value for key, value in layer.items() if key != "kernel"}
        if kernel is not None:
            changed["kernel"] = kernel
    return {**params, name: changed}


def float_layers(module: nnx.Module) -> dict[str, str]:
    """The layers of `module` that stay float by dotted path, and why: those whose class says `stays_float`."""
    return {
        ".".join(map(str, path)): layer.stays_float
        for path, layer in nnx.iter_modules(module)
        if hasattr(layer, "stays_float")
    }


def linear_layers(module: nnx.Module) -> dict[str, nnx.Module]:
    """The linear layers of `module` by dotted path."""
    return {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module) if isinstance(layer, LINEAR)}


def record_inputs(module: nnx.Module, known: Mapping[str, Input] | None = None) -> dict[str, Input]:
    """Make `module` note the input of each linear layer it calls, in the dict returned, by dotted path.

    For a module made inside the function being traced: return the entries wanted, and the compiler drops all
    that they do not need.

    Args:
        module: changed in place.
        known: inputs that were recorded before. The layers take them in place of what they are called with,
            so that the compiler also drops whatever only they needed.
    """
    tape: dict[str, Input] = {}
    layers = linear_layers(module)
    if unknown := sorted(set(known or ()) - set(layers)):
        raise ValueError(f"no linear layers {unknown}: the module has {sorted(layers)}.")
    for path, layer in layers.items():
        *parents, name = path.split(".")
        parent: Any = module
        for key in parents:
            parent = getattr(parent, key)
        object.__setattr__(parent, name, _Tap(layer, path, tape, (known or {}).get(path)))
    return tape
