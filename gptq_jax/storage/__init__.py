"""Reading and writing checkpoints."""

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.load import load
from gptq_jax.storage.store import save

__all__ = ["CheckpointError", "load", "save"]
