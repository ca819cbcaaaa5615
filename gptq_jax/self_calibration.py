"""Calibration on text that the model writes itself, where no data is at hand (LLM-QAT, Liu et al. 2023).

As arXiv 2305.17888 generates its data: a first token drawn from the whole vocabulary, so that texts differ; a few that
are the likeliest; all others drawn from the model's distribution. How well such text calibrates is what Williams et al.
2024 (arXiv 2410.17170) compare.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from gptq_jax.generate import cache_capacity, consecutive, empty_cache, run_cached
from gptq_jax.models.base import Architecture, Model, Params, apply_head, embed, head_params
from gptq_jax.models.tensor_parallel import heads_of

SELF = "self"  # as a command line names it
LIKELIEST = 4  # tokens after the first: the paper has three to five
_TOLD_EVERY = 16  # tokens: as far as Python may run ahead of the device


def self_windows(
    model: Model,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 8,
    on_token: Callable[[int, int], None] | None = None,
) -> Int32[np.ndarray, "samples length"]:
    """Windows that a model writes, for `quantize(model, batches(windows, 8), ...)`.

    Assumes that what a model writes makes the inputs of its layers much as real text does. A window begins with the
    token that the tokenizer puts before texts, if it does. Where a text ends inside of a window, what the model has
    follow it comes next.

    Args:
        model: the float one; any supplied architecture.
        samples: windows; fewer are the first of more.
        length: tokens of each.
        seed: of first tokens and of what is drawn.
        temperature: what logits are divided by.
        batch_size: windows written at a time. Each keeps its keys and values.
        on_token: called now and then with how many tokens are written, and how many there will be.

    Raises:
        ValueError: a window longer than the model's context or too short, or another argument out of range.
    """
    if not isinstance(model, Model):
        raise TypeError("only supplied architectures write text: calibrate a module of one's own on text of yours.")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive.")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a positive number.")
    starts = _starts(model, samples, seed)
    if not starts.shape[1] < length <= model.config.context_length:
        raise ValueError(
            f"length={length} must be more than {starts.shape[1]} and at most the model's context of "
            f"{model.config.context_length} tokens."
        )
    batch_size = min(batch_size, samples)
    found = []
    for first in range(0, samples, batch_size):
        # The last batch is filled up, for the programs that there are.
        chosen = np.minimum(np.arange(first, first + batch_size), samples - 1)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(chosen, jnp.uint32))

        def told(position: int, first: int = first) -> None:
            if on_token is not None:
                done = first * length + position * min(batch_size, samples - first)
                on_token(done, samples * length)

        found.append(_written(model, starts[chosen], keys, length, temperature, told))
    return np.concatenate(found)[:samples]


def _starts(model: Model, samples: int, seed: int) -> Int32[np.ndarray, "samples given"]:
    """How each window begins: a token of the vocabulary that is not special, after what comes before all texts."""
    tokenizer = model.tokenizer
    count, special, before = model.config.vocab_size, [], []
    if tokenizer is not None:
        count, special = min(count, len(tokenizer)), tokenizer.all_special_ids
        if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            before = [tokenizer.bos_token_id]
    ordinary = np.setdiff1d(np.arange(count, dtype=np.int32), special)
    drawn = ordinary[np.random.default_rng(seed).integers(0, ordinary.size, size=samples)]
    return np.concatenate([np.full((samples, len(before)), before, np.int32), drawn[:, None]], axis=1)


def _written(
    model: Model,
    starts: Int32[np.ndarray, "batch given"],
    keys: Key[Array, "batch"],
    length: int,
    temperature: float,
    told: Callable[[int], None],
) -> Int32[np.ndarray, "batch length"]:
    """Token after token, all windows at once."""
    config, given = model.config, starts.shape[1]
    reads = head_params(config, model.params)
    caches: list[Any] = []
    tokens: list[Any] = []
    token = jnp.asarray(starts[:, :1])
    for position in range(length):
        tokens.append(token)
        if position % _TOLD_EVERY == 0:
            jax.block_until_ready(token)
            told(position)
        if position + 1 == length:
            break
        positions = consecutive(position, 1)
        x = embed(config, model.params, token, positions)
        if not caches:
            capacity = cache_capacity(length)
            caches = [
                empty_cache(config, len(starts), capacity, x.dtype, heads_of(block)) for block in model.params["layers"]
            ]
        x = run_cached(model, x, positions, caches)
        if position + 1 < given:
            token = jnp.asarray(starts[:, position + 1 : position + 2])
        else:
            likeliest = position + 1 < given + LIKELIEST
            token = _next(config, reads, keys, np.float32(temperature), likeliest, x, position + 1)
    return np.concatenate([np.asarray(token) for token in tokens], axis=1)


@partial(jax.jit, static_argnums=0)
def _next(
    config: Architecture,
    params: Params,
    keys: Key[Array, "batch"],
    temperature: Float[Array, ""],
    likeliest: Bool[Array, ""],
    x: Float[Array, "batch 1 d_model"],
    position: Int32[Array, ""],
) -> Int32[Array, "batch 1"]:
    """The tokens at `position`, each drawn with the key of its window."""
    logits = apply_head(config, params, x)[:, 0]
    of_place = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    drawn = jax.vmap(jax.random.categorical)(of_place, logits / temperature)
    return jnp.where(likeliest, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)[:, None]
