"""Capture the inputs of an NNX module's linear layers, and run quantized ones in their place.

Both replace submodules of a copy that lives only while a function is traced, so any module made of
`nnx.Linear` works unchanged and nothing is patched for anybody else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptq_jax.matmul import matmul
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.api import PreparedWeight

Params = dict[str, Any]  # nested dicts: names of submodules, then of arrays or QuantizedTensors
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

    weight: PreparedWeight
    paths: tuple[str, ...] = field(metadata={"static": True})
    sizes: tuple[int, ...] = field(metadata={"static": True})


class QuantizedLinear(nnx.Module):
    """`nnx.Linear` on a packed kernel."""

    def __init__(self, kernel: QuantizedTensor | PreparedWeight, bias: Float[Array, "d_out"] | None):
        self.kernel = nnx.data(kernel)
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """`x @ kernel + bias`, in the dtype of `x`."""
        return matmul(x, self.kernel, bias=self.bias)


class _SharedProduct:
    """A product that several layers take parts of: computed when the first of them is called."""

    def __init__(self, fused: FusedWeight):
        self.weight, self.starts = fused.weight, list(accumulate(fused.sizes))[:-1]
        self.x: Array | None = None
        self.parts: list[Array] = []

    def part(self, x: Array, index: int) -> Array:
        if self.x is not x:
            self.x, self.parts = x, jnp.split(matmul(x, self.weight), self.starts, axis=-1)
        return self.parts[index]


class FusedLinear(nnx.Module):
    """One of the layers of a FusedWeight."""

    def __init__(self, product: _SharedProduct, index: int, bias: Float[Array, "d_out"] | None):
        self.product = product
        self.index = index
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """`x @ kernel + bias`, in the dtype of `x`."""
        y = self.product.part(x, self.index)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias.astype(y.dtype), range(y.ndim - 1))


class _Tap:
    """Stands for a layer: keeps the input it is called with, or calls it with one that is known already."""

    def __init__(self, layer: nnx.Module, path: str, tape: dict[str, Array], known: Array | None):
        self.layer, self.path, self.tape, self.known = layer, path, tape, known

    def __call__(self, x: Array) -> Array:
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
        params: its arrays by name; where a Linear's kernel is a QuantizedTensor or a PreparedWeight, a
            QuantizedLinear takes its place, and FusedLinears that of the layers of each FusedWeight in
            `params["fused"]`.
    """
    module = nnx.merge(*nnx.split(abstract))
    own = {name: value for name, value in params.items() if name != FUSED}
    _fill(module, own)
    for fused in params.get(FUSED, ()):
        product = _SharedProduct(fused)
        for index, path in enumerate(fused.paths):
            *parents, name = path.split(".")
            parent, here = _descend(module, own, parents)
            setattr(parent, name, FusedLinear(product, index, here.get(name, {}).get("bias")))
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
        elif isinstance(value.get("kernel"), QuantizedTensor | PreparedWeight):
            setattr(module, name, QuantizedLinear(value["kernel"], value.get("bias")))
        else:
            _fill(getattr(module, name), value)


def linear_layers(module: nnx.Module) -> dict[str, nnx.Module]:
    """The linear layers of `module` by dotted path."""
    return {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, nnx.Linear | QuantizedLinear | FusedLinear)
    }


def record_inputs(module: nnx.Module, known: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Make `module` note the input of each linear layer it calls, in the dict returned, by dotted path.

    For a module made inside the function being traced: return the entries wanted, and the compiler drops all
    that they do not need.

    Args:
        module: changed in place.
        known: inputs that were recorded before. The layers take them in place of what they are called with,
            so that the compiler also drops whatever only they needed.
    """
    tape: dict[str, Array] = {}
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
