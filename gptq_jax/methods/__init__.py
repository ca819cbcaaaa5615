"""Quantization methods, one file each."""

from collections.abc import Callable, Mapping

from gptq_jax.methods.base import LayerBatch, Method, Solution
from gptq_jax.methods.coordinate_descent import coordinate_descent
from gptq_jax.methods.fractional_zeros import fractional_zeros
from gptq_jax.methods.gptaq import gptaq
from gptq_jax.methods.gptq import GPTQOptions, gptq, gptq_solve
from gptq_jax.methods.hqq import hqq
from gptq_jax.methods.qep import qep
from gptq_jax.methods.rtn import rtn

METHODS: Mapping[str, Callable[..., Method]] = {"gptq": gptq, "rtn": rtn, "qep": qep, "gptaq": gptaq, "hqq": hqq}

__all__ = [
    "METHODS",
    "GPTQOptions",
    "LayerBatch",
    "Method",
    "Solution",
    "coordinate_descent",
    "fractional_zeros",
    "gptaq",
    "gptq",
    "gptq_solve",
    "hqq",
    "qep",
    "rtn",
]
