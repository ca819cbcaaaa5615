"""Quantization methods, one file each."""

from collections.abc import Callable, Mapping

from gptq_jax.methods.base import LayerBatch, Method, Solution
from gptq_jax.methods.gptq import GPTQOptions, gptq, gptq_solve
from gptq_jax.methods.rtn import rtn

METHODS: Mapping[str, Callable[..., Method]] = {"gptq": gptq, "rtn": rtn}

__all__ = ["METHODS", "GPTQOptions", "LayerBatch", "Method", "Solution", "gptq", "gptq_solve", "rtn"]
