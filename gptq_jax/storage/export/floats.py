"""The dequantized model, as any reader of Hugging Face checkpoints takes it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gptq_jax.models.base import Model
from gptq_jax.storage.export.base import Named, Plan, as_dtype, modules


def plan(model: Model, dtype: str) -> Plan:
    """Every tensor in `dtype`; weights are dequantized in float32, one at a time, then rounded."""
    found = modules(model)

    def tensors() -> Iterator[Named]:
        yield from found.float_tensors(dtype)
        for name, tensor in found.packed.items():
            yield f"{name}.weight", as_dtype(name, jax.tree.map(jnp.asarray, tensor).dequantize().T, dtype)

    weights = sum(tensor.d_in * tensor.d_out for tensor in found.packed.values())
    return Plan(tensors, None, (found.float_count + weights) * jnp.dtype(dtype).itemsize)
