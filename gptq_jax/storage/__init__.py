"""Reading and writing checkpoints."""

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.checkpoint_source import CheckpointSource, open_checkpoint
from gptq_jax.storage.load import load
from gptq_jax.storage.sink import StoreSink
from gptq_jax.storage.store import save

__all__ = ["CheckpointError", "CheckpointSource", "StoreSink", "load", "open_checkpoint", "save"]
