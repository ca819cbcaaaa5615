"""A linear layer with a trainable product of two thin matrices beside it (LoRA, arXiv:2106.09685)."""

from dataclasses import dataclass, field
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

LORA = "lora"  # the name, beside a block's submodules, of a dict of LowRanks by the dotted path of their layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class LowRank:
    """What is added to a weight: `scale * a @ b` (equation 3 of the paper, whose BA is our transposed `a @ b`).

    Attributes:
        a: from the inputs.
        b: to the outputs.
        scale: alpha / rank. Static.
    """

    a: Float[Array, "d_in rank"]
    b: Float[Array, "rank d_out"]
    scale: float = field(metadata={"static": True})

    def product(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """`scale * x @ a @ b`, in the dtype of `x`."""
        return self.scale * jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))

    def weight(self) -> Float[Array, "d_in d_out"]:
        """`scale * a @ b`, in float32."""
        wide = (leaf.astype(jnp.float32) for leaf in (self.a, self.b))
        return self.scale * jnp.matmul(*wide, precision="highest")


class LowRankLinear(nnx.Module):
    """Any linear layer, and a LowRank beside it."""

    def __init__(self, layer: Any, added: LowRank):
        self.layer = layer
        self.added = nnx.data(added)

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """`layer(x) + x @ (scale * a @ b)`, in the dtype of the layer's result."""
        y = self.layer(x)
        return y + self.added.product(x).astype(y.dtype)
