"""A Linen module as a function of its parameters, its blocks marked."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import flax.linen as nn
from flax import errors

from gptq_jax.hooks.program import mark
from gptq_jax.hooks.registry import call_layer

IsBlock = Callable[[str, Any], bool]  # of a module's dotted path and the module


class LinenFunction:
    """`module.apply` on parameters by path.

    Attributes:
        module: the user's, never changed.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def name(self) -> str:
        """Of the module's class."""
        return type(self.module).__name__

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError if the module cannot be called so."""
        method = getattr(type(self.module), kwargs.get("method") or "__call__")
        own = {name: value for name, value in kwargs.items() if name not in ("method", "mutable", "rngs")}
        inspect.signature(method).bind(self.module, *args, **own)

    def call(self, params: Any, state: Any, args: Any, kwargs: Any, is_block: IsBlock | None) -> Any:
        """What the module returns.

        Args:
            params: its tree.
            state: the other collections.
            args, kwargs: of `module.apply`.
            is_block: which submodules are blocks, whose calls are marked like those of registered layers; None:
                mark nothing.

        Raises:
            ValueError: the parameters do not fit, or random numbers are asked for.
        """

        def interceptor(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if is_block is None or context.method_name != "__call__":
                return next_function(*args, **kwargs)
            path, module = ".".join(context.module.path), context.module
            with mark(path) if is_block(path, module) else nullcontext():
                return call_layer(next_function, module, path, args, kwargs)

        try:
            with nn.intercept_methods(interceptor):
                return self.module.apply({"params": params, **state}, *args, **kwargs)
        except (errors.ScopeParamNotFoundError, errors.ScopeParamShapeError, errors.ScopeCollectionNotFound) as error:
            raise ValueError(f"params do not fit {self.name}: {_first_line(error)}") from error
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{self.name} draws random numbers ({_first_line(error)}): call it with its dropout off, e.g. "
                "deterministic=True, or pass rngs among the arguments."
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).split(" (https://")[0].splitlines()[0]
