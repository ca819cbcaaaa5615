"""The MLP of a block: gated, gated with one layer for both halves, or plain."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptq_jax.models.residuals import Part

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(NamedTuple):
    """One kind.

    Attributes:
        layers: (hidden, inner) -> (d_in, d_out) of each linear layer by its role, a field of `Names`.
        transform: (part, activation, x) -> what is added to the residual stream.
    """

    layers: Callable[[int, int], dict[str, tuple[int, int]]]
    transform: Callable[[Part, Callable[[Array], Array], Array], Any]


def _gated(part: Part, activation: Callable[[Array], Array], x: Array) -> Array:
    return part("down")(activation(part("gate")(x)) * part("up")(x))


def _fused(part: Part, activation: Callable[[Array], Array], x: Array) -> Array:
    gate, up = jnp.split(part("gate_up")(x), 2, axis=-1)
    return part("down")(activation(gate) * up)


def _plain(part: Part, activation: Callable[[Array], Array], x: Array) -> Array:
    return part("down")(activation(part("up")(x)))


MLPS: dict[str, MLP] = {
    "gated": MLP(lambda d, inner: {"gate": (d, inner), "up": (d, inner), "down": (inner, d)}, _gated),
    "fused": MLP(lambda d, inner: {"gate_up": (d, 2 * inner), "down": (inner, d)}, _fused),
    "plain": MLP(lambda d, inner: {"up": (d, inner), "down": (inner, d)}, _plain),
}
