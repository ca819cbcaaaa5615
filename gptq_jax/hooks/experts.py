"""Linear layers of experts, stacked: each row of their input is of the expert that its token was routed to."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from gptq_jax.matmul import Prepared, grouped_matmul
from gptq_jax.tensor import QuantizedTensor


class Routed(NamedTuple):
    """Rows of tokens, sorted by expert: `top_k` of each token, one for each expert that it was routed to.

    Layers hand on all but the rows, so that whoever captured an input also has what leads back to the tokens.

    Attributes:
        rows: what experts are fed, or give.
        sizes: rows of each expert, which come one after another.
        choice: that each row is: an index into tokens x top_k.
        weights: of the experts of each token in their sum, likeliest first.
    """

    rows: Float[Array, "rows features"]
    sizes: Int32[Array, "experts"]
    choice: Int32[Array, "rows"]
    weights: Float[Array, "tokens top_k"]

    @property
    def token(self) -> Int32[Array, "rows"]:
        """The token that each row is of."""
        return self.choice // self.weights.shape[1]

    @property
    def row(self) -> Int32[Array, "tokens top_k"]:
        """The row of each choice of each token."""
        return jnp.argsort(self.choice).astype(jnp.int32).reshape(self.weights.shape)


def route(
    x: Float[Array, "tokens features"],
    experts: Int32[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
    count: int,
) -> Routed:
    """Each token once for each of its experts, sorted by expert.

    Args:
        x: the tokens.
        experts: of each, all different, likeliest first.
        weights: of these.
        count: of all experts.
    """
    chosen = experts.reshape(-1)
    choice = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(count, jnp.int32).at[chosen].add(1)
    return Routed(x[choice // experts.shape[1]], sizes, choice, weights)


def combine(routed: Routed) -> Float[Array, "tokens features"]:
    """The weighted sum of each token's rows, in float32, in the dtype of the rows."""
    # A gather, since adding rows up where they belong has no fixed order on a GPU.
    rows = routed.rows[routed.row].astype(jnp.float32)
    return jnp.sum(rows * routed.weights[..., None], axis=1).astype(routed.rows.dtype)


class ExpertLinear(nnx.Module):
    """A linear layer of each expert, without biases; kernels are stacked, [experts, d_in, d_out]."""

    def __init__(self, experts: int, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.zeros((experts, d_in, d_out)))

    def __call__(self, routed: Routed) -> Routed:
        """Each row times the kernel of its expert."""
        return routed._replace(rows=grouped_matmul(routed.rows, self.kernel[...], routed.sizes))


class QuantizedExpertLinear(nnx.Module):
    """`ExpertLinear` on packed kernels."""

    def __init__(self, kernel: QuantizedTensor | Prepared):
        self.kernel = nnx.data(kernel)

    def __call__(self, routed: Routed) -> Routed:
        """Each row times the kernel of its expert."""
        return routed._replace(rows=grouped_matmul(routed.rows, self.kernel, routed.sizes))


def is_stacked(weight: QuantizedTensor | Prepared) -> bool:
    """Whether a packed weight is one of experts."""
    if isinstance(weight, QuantizedTensor):
        return weight.codes.ndim == 3
    return weight.problem.experts is not None
