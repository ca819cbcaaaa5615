"""A user's own language model where evaluation expects a supplied one: its stream is its logits, its head nothing."""

import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptq_jax.models.adapted import AdaptedModel


class Identity(nnx.Module):
    """Gives back what it is called with."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x`."""
        return x


@dataclass(frozen=True)
class LogitsConfig:
    """What evaluation asks of an architecture, of a module that makes logits itself; its head has no parameters.

    Attributes:
        vocab_size: logits of a token.
        context_length: unknown, so that no length is refused here.
    """

    vocab_size: int
    context_length: int = sys.maxsize
    tie_embeddings: bool = False

    def abstract_head(self) -> nnx.Module:
        """Logits -> logits."""
        return Identity()


def logits_config(model: AdaptedModel, length: int) -> LogitsConfig:
    """The vocabulary of a module called with tokens [batch, time] alone.

    Raises:
        ValueError: it needs more arguments, or what it returns are no logits [batch, time, vocab].
    """
    shape = jax.eval_shape(logits, model, jax.ShapeDtypeStruct((1, length), jnp.int32)).shape
    if len(shape) != 3 or shape[:2] != (1, length):
        raise ValueError(
            f"{model.function.name} returns an array of shape {shape} for tokens [1, {length}], no logits."
        )
    return LogitsConfig(shape[-1])


def logits(model: AdaptedModel, tokens: Int32[Array, "batch time"]) -> Float[Array, "..."]:
    """What the module returns, or its first or its `logits`, in float32."""
    found: Any = model(tokens)
    found = found[0] if isinstance(found, tuple | list) else getattr(found, "logits", found)
    if not isinstance(found, jax.Array):
        raise ValueError(f"{model.function.name} returns {type(found).__name__}, no array of logits.")
    return found.astype(jnp.float32)
