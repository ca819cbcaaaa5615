"""Normalizations of the last axis, in float32 whatever the dtype of their input."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale)."""

    def __init__(self, features: int, epsilon: float, *, offset: float = 0.0, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalize the last axis."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = _along_last(self.scale[...], x.ndim)
        if self.offset:
            scale = scale + self.offset
        return (x32 * inverse * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias."""

    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalize the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = _along_last(self.scale[...], x.ndim), _along_last(self.bias[...], x.ndim)
        return (centred * inverse * scale + bias).astype(x.dtype)


# Called with (features, epsilon, rngs=...).
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "rms": RMSNorm,
    "rms_plus_one": partial(RMSNorm, offset=1.0),  # Gemma stores scale - 1
    "layer": LayerNorm,
}


def _along_last(values: Float[Array, "features"], ndim: int) -> Float[Array, "..."]:
    return jnp.expand_dims(values.astype(jnp.float32), range(ndim - 1))
