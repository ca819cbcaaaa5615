"""Methods by the names that a command line gives them."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gptq_jax.correction import low_rank_correction
from gptq_jax.distillation import end_to_end_tuning
from gptq_jax.grids import GRIDS
from gptq_jax.methods import METHODS, Method, coordinate_descent, fractional_zeros, qep
from gptq_jax.methods.base import Finish
from gptq_jax.methods.contract import blaming
from gptq_jax.methods.qep import ALPHA
from gptq_jax.rewrites import REWRITES
from gptq_jax.tuning import TUNINGS

# Methods that take the one they go around.
AROUND: Mapping[str, Callable[..., Method]] = {
    "qep": qep,
    "descent": coordinate_descent,
    "fractions": fractional_zeros,
}
# What is done to the whole model in the end.
FINISHES: Mapping[str, Callable[..., Finish]] = {"distill": end_to_end_tuning, "eora": low_rank_correction}
# What a name goes around that comes last, where that is possible. Learned rounding begins at rounding to nearest.
ALONE: Mapping[str, str] = {
    "qep": "gptq",
    "descent": "gptq",
    "fractions": "gptq",
    "tune": "gptq",
    "autoround": "rtn",
    "distill": "gptq",
    "eora": "gptq",
}


def make_method(name: str, options: Mapping[str, Any], *, alpha: float | None = None) -> Method:
    """The method called `name`, alone or with others around it, the outermost first: "hadamard+qep+descent+gptq".

    Args:
        name: the last is in METHODS, or `module:factory`, which returns a method; those before it are in AROUND,
            REWRITES, TUNINGS or FINISHES. "autoround" alone goes around rtn, all others that can around gptq.
        options: that the last is called with.
        alpha: of qep or gptaq; None for their own.

    Raises:
        ValueError: there is no such method, its module cannot be imported, the factory fails or returns none, or
            nothing takes `alpha`.
    """
    *outer, inner = whole(name).split("+")
    known = (*AROUND, *REWRITES, *TUNINGS, *FINISHES)
    if unknown := [part for part in outer if part not in known]:
        raise ValueError(f"--method {name!r}: {unknown[0]!r} is none of {', '.join(known)}.")
    if alpha is not None and "qep" not in outer and inner != "gptaq":
        raise ValueError(f"--alpha {alpha} goes with qep or gptaq, not with --method {name!r}.")
    method = _innermost(inner, {**options, "alpha": alpha} if alpha is not None and inner == "gptaq" else options)
    for part in reversed(outer):
        if part in REWRITES:
            if method.rewrite is not None:
                raise ValueError(f"--method {name!r} rewrites the model twice: leave out {part!r} or the other.")
            # Scales are searched for the grid that will be used.
            searched = dict(method.settings).get("grid") if part == "awq" else None
            method = method._replace(rewrite=REWRITES[part](**({"grid": searched} if searched in GRIDS else {})))
        elif part in TUNINGS:
            if method.tuning is not None:
                raise ValueError(f"--method {name!r} tunes each block twice: leave out {part!r} or the other.")
            method = method._replace(tuning=TUNINGS[part]())
        elif part in FINISHES:
            if method.finish is not None:
                raise ValueError(f"--method {name!r} has two ends: leave out {part!r} or the other.")
            # Factors make up for the loss of the weights that the method aimed at.
            towards = {"alpha": ALPHA if alpha is None else alpha} if part == "eora" and "qep" in outer else {}
            method = method._replace(finish=FINISHES[part](**towards))
        else:
            method = AROUND[part](method, **({"alpha": alpha} if part == "qep" and alpha is not None else {}))
    return method


def whole(name: str) -> str:
    """The name with the method it goes around where it leaves that out: "tune+qep" is "tune+qep+gptq"."""
    last = name.rpartition("+")[2]
    return f"{name}+{ALONE[last]}" if last in ALONE else name


def _innermost(name: str, options: Mapping[str, Any]) -> Method:
    module_name, separator, factory_name = name.partition(":")
    if not separator:
        if name not in METHODS:
            raise ValueError(f"--method {name!r} is none of {', '.join(METHODS)}, nor module:factory.")
        return METHODS[name](**options)
    if os.getcwd() not in sys.path:  # a console script's path begins with its own folder
        sys.path.insert(0, os.getcwd())
    with blaming(f"--method {name!r}: importing {module_name!r}"):
        module = importlib.import_module(module_name) if module_name else None
    factory = getattr(module, factory_name, None)
    if factory is None:
        raise ValueError(f"--method {name!r}: {module_name!r} has no function {factory_name!r}.")
    with blaming(f"--method {name!r}: {factory_name}({', '.join(options)})"):
        method = factory(**options) if callable(factory) else factory
    if not isinstance(method, Method):
        raise ValueError(f"--method {name!r} gave {type(method).__name__}, but must give a gptq_jax.Method.")
    return method
