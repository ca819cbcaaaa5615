"""Sparse MLPs: a router sends each token to a few of many experts (Mixtral, Qwen3-MoE)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptq_jax.hooks.experts import ExpertLinear, combine, route
from gptq_jax.models.residuals import Part

EXPERT = "{expert}"  # in the name of a tensor that a checkpoint has for each expert


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The sparse MLPs of a decoder; hashable.

    Attributes:
        count: experts of a block.
        top_k: experts of a token.
        intermediate_size: width inside an expert.
        normalize: the weights of a token's experts are made to sum to one; otherwise they are their probabilities
            among all experts.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"experts' intermediate_size={self.intermediate_size} must be positive.")
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"a token cannot be routed to {self.top_k} of {self.count} experts.")


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


def expert_layers(hidden: int, experts: Experts, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """The layers that stand in place of an MLP by their role, a field of `Names`."""
    inner = experts.intermediate_size
    return {
        "router": Router(hidden, experts, rngs=rngs),
        "expert_gate": ExpertLinear(experts.count, hidden, inner, rngs=rngs),
        "expert_up": ExpertLinear(experts.count, hidden, inner, rngs=rngs),
        "expert_down": ExpertLinear(experts.count, inner, hidden, rngs=rngs),
    }


def by_experts(
    part: Part, activation: Callable[[Array], Array], x: Float[Array, "batch time hidden"]
) -> Float[Array, "batch time hidden"]:
    """What a token's experts, each down(activation(gate(x)) * up(x)), add to the residual stream in all."""
    router, tokens = part("router"), x.reshape(-1, x.shape[-1])
    chosen, weights = router(tokens)
    routed = route(tokens, chosen, weights, router.experts.count)
    gate = part("expert_gate")(routed)
    down = part("expert_down")(gate._replace(rows=activation(gate.rows) * part("expert_up")(routed).rows))
    return combine(down).reshape(x.shape)
