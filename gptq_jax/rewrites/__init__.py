"""Changes of a model's weights that leave its outputs as they are and make it easier to quantize, one file each."""

from collections.abc import Callable, Mapping
from functools import partial

from gptq_jax.methods.base import Rewrite
from gptq_jax.rewrites.hadamard import hadamard
from gptq_jax.rewrites.scaling import awq, smooth

REWRITES: Mapping[str, Callable[..., Rewrite]] = {
    "hadamard": hadamard,
    "hadamard_values": partial(hadamard, values=True),
    "hadamard_online": partial(hadamard, values=True, online=True),
    "awq": awq,
    "smooth": smooth,
}

__all__ = ["REWRITES", "awq", "hadamard", "smooth"]
