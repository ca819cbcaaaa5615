"""How far a model's next-token distributions are from another's, and its slope in what the head takes."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptq_jax.evaluate import by_pieces
from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Headed, apply_head

Pair = tuple[Headed, Headed]  # the float model's and the other's
HeadParams = tuple[Params, Params]


@partial(jax.jit, static_argnums=0)
def divergence(
    configs: Pair,
    heads: HeadParams,
    wanted: Float[Array, "rows time d_model"],
    x: Float[Array, "rows time d_other"],
    mask: Bool[Array, "rows time"] | None,
) -> Float[Array, "2"]:
    """The sum of KL(wanted || x) over real tokens, in nats, and how many there are.

    Args:
        configs: of the float model and of the other.
        heads: what their heads read, of `head_params`.
        wanted: the float model's stream after its last block.
        x: the other's.
        mask: True for real tokens; None if all are.
    """
    each = by_pieces(partial(_of_tokens, configs, heads), _width(configs), (wanted, x))
    return jnp.stack([jnp.sum(_real(each, mask)), jnp.sum(_real(jnp.ones_like(each), mask))])


@partial(jax.jit, static_argnums=0)
def divergence_slope(
    configs: Pair,
    heads: HeadParams,
    wanted: Float[Array, "rows time d_model"],
    x: Float[Array, "rows time d_other"],
    mask: Bool[Array, "rows time"] | None,
) -> tuple[Float[Array, ""], Float[Array, "rows time d_other"]]:
    """The mean over real tokens, and its slope in `x`; arguments as for `divergence`."""

    def piece(inputs: tuple[Array, Array]) -> Array:
        # In here, so that no piece's logits are kept for later.
        def total(x: Array) -> tuple[Array, Array]:
            each = _of_tokens(configs, heads, (inputs[0], x))
            return jnp.sum(each), each

        slope, each = jax.grad(total, has_aux=True)(inputs[1])
        return jnp.concatenate([each[:, None], slope.astype(jnp.float32)], axis=1)

    found = by_pieces(piece, _width(configs), (wanted, x))
    count = jnp.sum(_real(jnp.ones(found.shape[:2]), mask))
    real = _real(found, mask) / count
    return jnp.sum(real[..., 0]), real[..., 1:].astype(x.dtype)


def _of_tokens(configs: Pair, heads: HeadParams, streams: tuple[Array, Array]) -> Float[Array, "tokens"]:
    log_p, log_q = (
        jax.nn.log_softmax(apply_head(config, params, x[None])[0])
        for config, params, x in zip(configs, heads, streams, strict=True)
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _width(configs: Pair) -> int:
    return 2 * configs[0].vocab_size


def _real(array: Float[Array, "rows time ..."], mask: Bool[Array, "rows time"] | None) -> Float[Array, "rows time ..."]:
    if mask is None:
        return array
    return jnp.where(jnp.expand_dims(mask, range(2, array.ndim)), array, 0.0)
