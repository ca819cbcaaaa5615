"""Methods by the names that a command line gives them."""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from gptq_jax.methods import METHODS, Method


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called `name` in METHODS, or that `module:factory` returns, called with `options`.

    Raises:
        ValueError: there is no such method, or the factory returns none.
        ImportError: the module cannot be imported.
    """
    module_name, separator, factory_name = name.partition(":")
    if not separator:
        if name not in METHODS:
            raise ValueError(f"--method {name!r} is none of {', '.join(METHODS)}, nor module:factory.")
        return METHODS[name](**options)
    if os.getcwd() not in sys.path:  # a console script's path begins with its own folder
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (AttributeError, ValueError):
        raise ValueError(f"--method {name!r}: {module_name!r} has no function {factory_name!r}.") from None
    method = factory(**options) if callable(factory) else factory
    if not isinstance(method, Method):
        raise ValueError(f"--method {name!r} gave {type(method).__name__}, but must give a gptq_jax.Method.")
    return method
