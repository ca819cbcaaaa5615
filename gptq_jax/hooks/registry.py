"""Layers of a user whose product the trace does not show, and how their weights are matrices."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


class LayerKind(NamedTuple):
    """A registered layer.

    Attributes:
        weight: the name of its parameter.
        inputs: axes of the parameter that are summed over with the last axes of the layer's input.
    """

    weight: str
    inputs: tuple[int, ...]


_KINDS: dict[type, LayerKind] = {}
_LAYER = re.compile(r"gptq_jax\.layer\(([^)]*)\)")
_INPUT = re.compile(r"gptq_jax\.input\((.*)\)\(([\d,]*)\)")


def register_layer(cls: type, *, weight: str = "kernel", inputs: int | Sequence[int] = 0) -> None:
    """Say how the weight of a layer is a matrix, where its product is written as none.

    A layer that multiplies by `@`, `jnp.einsum` or `lax.dot_general` needs no registration: its product is found.
    This is for others, such as a convolution of width one or a kernel in Pallas. While the model is calibrated
    the layer's first argument is recorded; packed, its weight is unpacked each time the layer runs, because
    only the layer knows its product.

    Args:
        cls: a Linen or NNX module class; subclasses count.
        weight: the name of the parameter.
        inputs: its axes that are summed over with the last axes of the layer's first argument, in their order
            there; the other axes are outputs. For a kernel [1, d_in, d_out]: 1.

    Raises:
        TypeError: `cls` is no class of Flax modules.
        ValueError: `inputs` names no axis, or one twice.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module | nnx.Module)):
        raise TypeError(f"cls={cls!r} is no class of Linen or NNX modules.")
    axes = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    if not axes or len(set(axes)) < len(axes) or min(axes) < 0:
        raise ValueError(f"inputs={inputs!r} must name different axes of {weight!r}, counted from 0.")
    _KINDS[cls] = LayerKind(weight, axes)


def kind_of(module: Any) -> LayerKind | None:
    """How a module is registered, if it or a class it comes from is."""
    return next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), None)


def mark_input(x: Any, path: str, kind: LayerKind) -> Any:
    """`x`, which the trace then shows as the input of the layer at `path`."""
    return checkpoint_name(x, f"gptq_jax.input({path}.{kind.weight})({','.join(map(str, kind.inputs))})")


def marked_input(eqn: Any) -> tuple[str, tuple[int, ...]] | None:
    """The path of the weight, and its axes, if an equation marks an input."""
    found = _INPUT.fullmatch(str(eqn.params.get("name", ""))) if eqn.primitive.name == "name" else None
    return found and (found[1], tuple(map(int, found[2].split(","))))


def call_layer(function: Callable[..., Any], module: Any, path: str, args: Any, kwargs: Any) -> Any:
    """Call a module; where it is registered, the trace shows what it is and what it is fed."""
    kind = kind_of(module)
    if kind is None or not args:
        return function(*args, **kwargs)
    with jax.named_scope(f"gptq_jax.layer({path}.{kind.weight})"):
        return function(mark_input(args[0], path, kind), *args[1:], **kwargs)


def registered_in(name_stack: str) -> list[str]:
    """The weights of registered layers that an equation with this stack of names is in."""
    return _LAYER.findall(name_stack)
