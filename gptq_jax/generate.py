"""Generate text: prefill in chunks of one size, then token by token against a key-value cache.

Cache capacities are powers of two, so nothing is compiled anew for another prompt or another token until a
conversation outgrows one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Shaped

from gptq_jax.models.base import (
    Architecture,
    Cache,
    Model,
    Params,
    apply_head,
    check_tokens,
    embed,
    head_params,
    run_block,
)
from gptq_jax.models.tensor_parallel import heads_of, where_even

PREFILL_CHUNK = 64
_LEAST_CAPACITY = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from logits.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: only the `top_k` likeliest tokens; None for all.
        top_p: of those, only the fewest whose probability reaches `top_p`; None for all.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, or None.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")


GREEDY = Sampling()


def generate(
    model: Model,
    prompt: str | Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    stop_tokens: Iterable[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that follows `prompt`.

    Args:
        model: with a tokenizer.
        prompt: text, or the tokens [time] of one.
        max_new_tokens: stop after this many tokens.
        temperature: 0 takes the likeliest token.
        top_k: draw from the `top_k` likeliest tokens.
        top_p: draw from the fewest tokens whose probability reaches `top_p`.
        seed: of the random numbers.
        chat: `prompt` is a user's message, put into the tokenizer's chat template.
        stop_tokens: stop before any of these; None for the end tokens that the model or tokenizer names.
        on_text: called with each piece of text as it comes.

    Raises:
        ValueError: an argument is out of range, the prompt is empty, prompt and new tokens together exceed
            the model's context, or the model has no tokenizer (or no chat template).
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    pieces = []
    for piece in stream(
        model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, stop_tokens=stop_tokens
    ):
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    return "".join(pieces)


def stream(
    model: Model,
    prompt: str | Any,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    chat: bool = False,
    stop_tokens: Iterable[int] | None = None,
) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece; characters of several bytes come whole.

    Arguments and errors are those of `generate`, and errors are raised at once, not at the first piece.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: use generate_tokens, or give it one.")
    prompt_tokens = _prompt_tokens(model.tokenizer, prompt, chat)
    tokens = generate_tokens(
        model, prompt_tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens
    )
    return _decode(model.tokenizer, prompt_tokens, tokens)


def generate_tokens(
    model: Model,
    prompt: Any,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop_tokens: Iterable[int] | None = None,
) -> Iterator[int]:
    """The tokens that follow the tokens `prompt` [time], up to a stop token, which is left out.

    Arguments and errors are those of `generate`; the model needs no tokenizer.
    """
    if not isinstance(model, Model):
        raise TypeError("only supplied architectures generate: a module of one's own has no cache that is known here.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    prompt = np.asarray(check_tokens(_sequence(prompt)[None], model.config.vocab_size))[0]
    total = len(prompt) + max_new_tokens
    if total > model.config.context_length:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{model.config.context_length}: shorten either."
        )
    stops = frozenset(end_tokens(model) if stop_tokens is None else stop_tokens)
    return _generate(model, prompt, max_new_tokens, sampling, stops)


def end_tokens(model: Model) -> frozenset[int]:
    """The tokens that end a text, by the checkpoint's config and the tokenizer."""
    named = model.source.get("eos_token_id")
    found = {token for token in (named if isinstance(named, list | tuple) else [named]) if token is not None}
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        found.add(model.tokenizer.eos_token_id)
    return frozenset(found)


def _generate(
    model: Model,
    prompt: Int32[np.ndarray, "time"],
    max_new_tokens: int,
    sampling: Sampling,
    stops: frozenset[int],
) -> Iterator[int]:
    config = model.config
    reads = head_params(config, model.params)
    draw = partial(
        _draw,
        config,
        sampling.temperature > 0,
        sampling.top_k and min(sampling.top_k, config.vocab_size),
        sampling.top_p is not None,
        reads,
        jax.random.key(sampling.seed),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p or 1.0),
    )
    caches: list[Cache] | None = None
    padded = np.zeros(-(-len(prompt) // PREFILL_CHUNK) * PREFILL_CHUNK, np.int32)
    padded[: len(prompt)] = prompt
    for start in range(0, len(padded), PREFILL_CHUNK):
        positions = consecutive(start, PREFILL_CHUNK)
        x = embed(config, model.params, jnp.asarray(padded[None, start : start + PREFILL_CHUNK]), positions)
        if caches is None:
            capacity = cache_capacity(len(prompt) + max_new_tokens)
            caches = [empty_cache(config, 1, capacity, x.dtype, heads_of(block)) for block in model.params["layers"]]
        x = run_cached(model, x, positions, caches)
    assert caches is not None
    position = len(prompt)
    token = draw(x, (position - 1) % PREFILL_CHUNK, position)
    for remaining in reversed(range(max_new_tokens)):
        # The next token is set going before this one is read, so that the device never waits for Python.
        following = token
        if remaining:
            positions = consecutive(position, 1)
            x = run_cached(model, embed(config, model.params, token, positions), positions, caches)
            position += 1
            following = draw(x, 0, position)
        value = int(token[0, 0])
        if value in stops:
            return
        yield value
        token = following


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(config: Architecture, batch: int, capacity: int, dtype: Any, heads: NamedSharding | None) -> Cache:
    """A cache of one block, its heads placed by `heads` where they divide evenly."""
    cache = config.init_cache(batch, capacity, dtype)
    if heads is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, jax.tree.map(lambda leaf: where_even(heads, leaf.shape), cache))


def consecutive(start: int, time: int) -> Int32[Array, "1 time"]:
    """The positions of `time` tokens from `start` on."""
    return jnp.asarray(np.arange(start, start + time, dtype=np.int32)[None])


def run_cached(
    model: Model, x: Float[Array, "batch time d_model"], positions: Int32[Array, "1 time"], caches: list[Cache]
) -> Float[Array, "batch time d_model"]:
    """All blocks on tokens at consecutive `positions`; replaces the entries of `caches`."""
    for index, block_params in enumerate(model.params["layers"]):
        kind = model.config.layer_kind(index)
        x, caches[index] = run_block(model.config, kind, block_params, x, positions, caches[index])
    return x


def cache_capacity(tokens: int) -> int:
    """The least power of two that holds `tokens`: a multiple of the prefill chunk, so its padding fits."""
    return max(_LEAST_CAPACITY, 1 << (tokens - 1).bit_length())


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    config: Architecture,
    random: bool,
    top_k: int | None,
    nucleus: bool,
    params: Params,
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    x: Float[Array, "1 time d_model"],
    index: Int32[Array, ""],
    position: Int32[Array, ""],
) -> Int32[Array, "1 1"]:
    """The token at `position`, from the residual stream's entry at `index`."""
    logits = apply_head(config, params, jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1))[0, 0]
    if not random:
        return jnp.argmax(logits).astype(jnp.int32).reshape(1, 1)
    tokens = None
    logits = logits / temperature
    if top_k is not None:
        logits, tokens = jax.lax.top_k(logits, top_k)
    elif nucleus:
        tokens = jnp.argsort(logits, descending=True)
        logits = logits[tokens]
    if nucleus:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)  # the first is always kept: top_p > 0
    drawn = jax.random.categorical(jax.random.fold_in(key, position), logits)
    return (drawn if tokens is None else tokens[drawn]).astype(jnp.int32).reshape(1, 1)


def _sequence(prompt: Any) -> Shaped[np.ndarray, "time"]:
    prompt = np.asarray(prompt)
    if prompt.size == 0:
        raise ValueError("the prompt has no tokens: pass a text that is not empty.")
    if prompt.ndim != 1:
        raise ValueError(f"the prompt has shape {prompt.shape}: pass the tokens [time] of one sequence.")
    return prompt


def _prompt_tokens(tokenizer: Any, prompt: str | Any, chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        if chat:
            raise ValueError("chat=True needs the prompt as text, to put into the chat template.")
        return _sequence(prompt).tolist()
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: generate without chat=True.")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def _decode(tokenizer: Any, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    from tokenizers.decoders import DecodeStream

    # The prompt goes before, since some tokenizers drop a leading space at the start of a text only.
    decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
    for token in tokens:
        if piece := decoder.step(tokenizer.backend_tokenizer, token):
            yield piece
