"""Changes of a model's weights that leave its outputs as they are and make it easier to quantize, one file each."""

from collections.abc import Callable, Mapping

from gptq_jax.methods.base import Rewrite
from gptq_jax.rewrites.hadamard import hadamard
from gptq_jax.rewrites.scaling import awq, smooth

REWRITES: Mapping[str, Callable[..., Rewrite]] = {"hadamard": hadamard, "awq": awq, "smooth": smooth}

__all__ = ["REWRITES", "awq", "hadamard", "smooth"]
