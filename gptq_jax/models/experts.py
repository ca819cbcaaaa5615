"""Sparse MLPs: a router sends each token to a few of many experts (Mixtral, Qwen3-MoE)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptq_jax.hooks.experts import ExpertLinear, Routed, combine, route

# Modules of a block here and in Hugging Face's checkpoints, where every expert has modules of its own.
MIXTRAL_NAMES = (
    ("mlp.gate", "block_sparse_moe.gate"),
    ("mlp.experts.gate_proj", "block_sparse_moe.experts.{expert}.w1"),
    ("mlp.experts.up_proj", "block_sparse_moe.experts.{expert}.w3"),
    ("mlp.experts.down_proj", "block_sparse_moe.experts.{expert}.w2"),
)
QWEN_NAMES = tuple(
    (f"mlp.experts.{name}", f"mlp.experts.{{expert}}.{name}") for name in ("gate_proj", "up_proj", "down_proj")
)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The sparse MLPs of a decoder; hashable.

    Attributes:
        count: experts of a block.
        top_k: experts of a token.
        intermediate_size: width inside an expert.
        normalize: the weights of a token's experts are made to sum to one; otherwise they are their probabilities
            among all experts.
        names: pairs of a module inside a block and Hugging Face's name of it, if they differ.
        dense_layers: blocks that have an ordinary MLP.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalize: bool = True
    names: tuple[tuple[str, str], ...] = QWEN_NAMES
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"experts' intermediate_size={self.intermediate_size} must be positive.")
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"a token cannot be routed to {self.top_k} of {self.count} experts.")

    def stored_name(self, module: str) -> str:
        """Hugging Face's name of a module of a block, "{expert}" in the place of an expert's number."""
        return dict(self.names).get(module, module)


class Router(nnx.Module):
    """Chooses the experts of each token."""

    stays_float: ClassVar[str] = "decides which experts a token sees, and is small beside them"

    def __init__(self, features: int, experts: Experts, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.zeros((features, experts.count)))
        self.experts = experts

    def __call__(
        self, x: Float[Array, "tokens features"]
    ) -> tuple[Int32[Array, "tokens top_k"], Float[Array, "tokens top_k"]]:
        """The experts of each token, likeliest first, and their float32 weights."""
        logits = jnp.matmul(x, self.kernel[...], preferred_element_type=jnp.float32)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.experts.top_k)
        if self.experts.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return chosen.astype(jnp.int32), weights


class StackedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), each row by its own expert."""

    def __init__(self, features: int, experts: Experts, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.activation = activation
        self.gate_proj = ExpertLinear(experts.count, features, experts.intermediate_size, rngs=rngs)
        self.up_proj = ExpertLinear(experts.count, features, experts.intermediate_size, rngs=rngs)
        self.down_proj = ExpertLinear(experts.count, experts.intermediate_size, features, rngs=rngs)

    def __call__(self, routed: Routed) -> Routed:
        """Transform each row."""
        gate = self.gate_proj(routed)
        return self.down_proj(gate._replace(rows=self.activation(gate.rows) * self.up_proj(routed).rows))


class SparseMLP(nnx.Module):
    """The weighted sum of what a token's experts make of it."""

    def __init__(self, features: int, experts: Experts, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.gate = Router(features, experts, rngs=rngs)
        self.experts = StackedMLP(features, experts, activation, rngs=rngs)
        self.count = experts.count

    def __call__(self, x: Float[Array, "batch time features"]) -> Float[Array, "batch time features"]:
        """Transform each token."""
        tokens = x.reshape(-1, x.shape[-1])
        routed = route(tokens, *self.gate(tokens), self.count)
        return combine(self.experts(routed)).reshape(x.shape)
