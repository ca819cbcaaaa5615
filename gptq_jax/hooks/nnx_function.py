"""An NNX module as a function of its parameters, its blocks marked on a copy."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import jax
from flax import nnx

from gptq_jax.hooks.program import mark
from gptq_jax.hooks.registry import call_layer, kind_of

IsBlock = Callable[[str, Any], bool]


class NnxFunction:
    """The call of a module on parameters by path.

    Attributes:
        graph: the module without its arrays.
    """

    def __init__(self, graph: Any, params: nnx.State, of: type):
        self.graph, self._params, self._class = graph, params, of

    @classmethod
    def of(cls, module: nnx.Module) -> tuple["NnxFunction", Any, nnx.State]:
        """The function, the module's parameters as nested dicts, and its other variables."""
        graph, params, state = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        return cls(graph, abstract, type(module)), _named(nnx.to_pure_dict(params)), state

    @property
    def name(self) -> str:
        """Of the module's class."""
        return self._class.__name__

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError if the module cannot be called so."""
        inspect.signature(self._class.__call__).bind(None, *args, **kwargs)

    def call(self, params: Any, state: Any, args: Any, kwargs: Any, is_block: IsBlock | None) -> Any:
        """What the module returns; see `LinenFunction.call`.

        Raises:
            ValueError: it changes its variables: random numbers are drawn, or a cache is written.
        """
        given = jax.tree.map(lambda leaf: leaf, self._params)
        nnx.replace_by_pure_dict(given, _unnamed(nnx.to_pure_dict(self._params), params))
        module = nnx.merge(self.graph, given, state)
        for path, child in list(nnx.iter_modules(module)) if is_block is not None else ():
            dotted = ".".join(map(str, path))
            block = is_block(dotted, child)  # type: ignore[misc]
            if block or kind_of(child) is not None:
                object.__setattr__(child, "__class__", _marked(type(child), dotted, block))
        before = _raw_state(module)
        out = module(*args, **kwargs)  # type: ignore[operator]
        after = _raw_state(module)
        for path, (variable, value) in before.items():
            if path in after and after[path][1] is not value:
                raise ValueError(_changed(self.name, ".".join(map(str, path)), variable))
        return out


def _raw_state(module: nnx.Module) -> dict[Any, tuple[nnx.Variable[Any], Any]]:
    """Variables that are no parameters by path, and what they hold now."""
    state = nnx.state(module, nnx.Not(nnx.Param))
    return {path: (variable, variable.get_raw_value()) for path, variable in nnx.to_flat_state(state)}


def _changed(name: str, path: str, variable: nnx.Variable[Any]) -> str:
    if isinstance(variable, nnx.RngState):
        return f"{name} draws random numbers from {path}: switch its dropout off with model.eval()."
    kind = type(variable).__name__
    return (
        f"{name} changes its {kind} {path} when called, which would be lost: switch that off, e.g. with model.eval()."
    )


@lru_cache
def _marked(of: type, path: str, block: bool) -> type:
    """A subclass whose calls are marked, as a block or as a registered layer; only the copy is of it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mark(path) if block else nullcontext():
            return call_layer(partial(of.__call__, self), self, path, args, kwargs)  # type: ignore[operator]

    return type(of.__name__, (of,), {"__call__": __call__})


def _named(tree: Any) -> Any:
    return {str(name): _named(child) for name, child in tree.items()} if isinstance(tree, dict) else tree


def _unnamed(like: Any, tree: Any) -> Any:
    """`tree` with the keys of `like`, which may be numbers."""
    return {name: _unnamed(child, tree[str(name)]) for name, child in like.items()} if isinstance(like, dict) else tree
