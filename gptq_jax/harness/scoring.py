"""Log-likelihoods of tokens under a model, many requests at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from gptq_jax.harness.requests import Batch, Scored, batches_by_length, truncate
from gptq_jax.models.base import Headed, Model, Params, apply_head, check_tokens, head_params, hidden_states

_LOGITS_AT_ONCE = 2**24  # elements: 64 MB in float32


def score(
    model: Model, requests: Sequence[Scored], *, batch_size: int, context_length: int | None = None
) -> Iterator[tuple[int, float, bool]]:
    """The log-likelihood of each continuation, and whether every token of it is the likeliest one.

    Requests come in an order of their own, those of like length together.

    Args:
        model: float or quantized.
        requests: contexts that are too long for the model lose their start.
        batch_size: requests at a time.
        context_length: tokens that the model is given at most; None: all that it can take.

    Yields:
        The place of a request, the sum of its log-probabilities in nats, and whether it is what greedy decoding gives.

    Raises:
        ValueError: a token outside the vocabulary, or a continuation that is longer than the model's context.
    """
    context = context_length or model.config.context_length
    cut = [truncate(request, context) for request in requests]
    params = head_params(model.config, model.params)
    for batch in batches_by_length([len(request.inputs) for request in cut], batch_size, context):
        tokens, targets = _padded([cut[row] for row in batch.rows], batch, batch_size)
        x = hidden_states(model, check_tokens(tokens, model.config.vocab_size))
        log_p, greedy = (np.asarray(part, np.float64) for part in _score(model.config, params, x, targets))
        for place, row in enumerate(batch.rows):
            real = targets[place] >= 0
            yield row, float(log_p[place][real].sum()), bool(greedy[place][real].all())


def _padded(
    requests: Sequence[Scored], batch: Batch, batch_size: int
) -> tuple[Int32[np.ndarray, "batch time"], Int32[np.ndarray, "batch time"]]:
    """Tokens, filled up on the right, where causal attention does not look; and targets, -1 where nothing is asked."""
    size = min(batch_size, 1 << (len(requests) - 1).bit_length())  # few shapes here too
    tokens = np.zeros((size, batch.length), np.int32)
    targets = np.full((size, batch.length), -1, np.int32)
    for row, request in enumerate(requests):
        inputs = request.inputs
        tokens[row, : len(inputs)] = inputs
        targets[row, len(inputs) - len(request.continuation) : len(inputs)] = request.continuation
    return tokens, targets


@partial(jax.jit, static_argnums=0)
def _score(
    config: Headed, params: Params, x: Float[Array, "batch time d_model"], targets: Int32[Array, "batch time"]
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Log-probability of each target, and 1 where it is the likeliest token; row by row, so that logits stay few."""

    def piece(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        x, target = inputs
        logits = apply_head(config, params, x[None])[0]
        chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        greedy = jnp.argmax(logits, axis=-1).astype(target.dtype) == target
        return chosen - jax.nn.logsumexp(logits, axis=-1), greedy.astype(jnp.float32)

    time = x.shape[1]
    size = max(1, min(time, _LOGITS_AT_ONCE // config.vocab_size))
    count = -(-time // size)
    size = -(-time // count)
    padding = count * size - time

    def row(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        x, target = inputs
        x = jnp.pad(x, ((0, padding), (0, 0))).reshape(count, size, -1)
        target = jnp.pad(target, (0, padding)).reshape(count, size)
        found = jax.lax.map(piece, (x, target))
        return found[0].reshape(-1)[:time], found[1].reshape(-1)[:time]

    return jax.lax.map(row, (x, targets))
