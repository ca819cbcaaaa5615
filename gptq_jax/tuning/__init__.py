"""Gradient descent on what the packed weights of a block are made of, after its layers are solved, one file each."""

from collections.abc import Callable, Mapping

from gptq_jax.methods.base import Tuning
from gptq_jax.tuning.block_tuning import block_tuning
from gptq_jax.tuning.learned_rounding import learned_rounding

TUNINGS: Mapping[str, Callable[..., Tuning]] = {"tune": block_tuning, "autoround": learned_rounding}

__all__ = ["TUNINGS", "block_tuning", "learned_rounding"]
