"""Causal attention with grouped queries: over a whole sequence, or over a cache of earlier keys.

Query head h attends with key head h // (query heads / key heads). Softmax is in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) is not NaN
_CHUNK = 128  # queries attended together on CPU: their scores stay in the cache of the processor
_MOST_CHUNKS = 8  # they are unrolled, and compile time should not grow with the sequence


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How products of queries and keys become what the softmax is given.

    Attributes:
        scale: what they are multiplied by; None for head_dim**-0.5.
        softcap: they are squeezed into (-softcap, softcap) by tanh, or not where it is None.
        slopes: of ALiBi, one for each query head: what a token of distance has its score lowered by.
    """

    scale: float | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None


PLAIN = Scores()


def causal_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    mask: Bool[Array, "batch time"] | None,
    window: int | None,
    scores: Scores = PLAIN,
) -> Float[Array, "batch time heads head_dim"]:
    """Each token attends to itself and those before it.

    Args:
        query: rotated queries.
        key: rotated keys.
        value: values.
        mask: True for tokens that may be attended to; None for all.
        window: a token attends to itself and `window - 1` before it; None for all before it.
        scores: what is made of the products.
    """
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        mask,
        cpu=partial(_by_chunks, window=window, scores=scores),
        default=partial(_at_once, window=window, scores=scores),
    )


class KVCache(NamedTuple):
    """Rotated keys, and values, of the tokens a block has seen, by position.

    Laid out as the products of `cached_attention` read them, so that a step copies neither.
    """

    keys: Float[Array, "batch kv_heads head_dim capacity"]
    values: Float[Array, "batch kv_heads capacity head_dim"]


def cached_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    cache: KVCache,
    positions: Int32[Array, "#batch time"],
    window: int | None,
    scores: Scores = PLAIN,
) -> tuple[Float[Array, "batch time heads head_dim"], KVCache]:
    """Each token attends to itself, those before it in `key`, and cached ones before `positions[0, 0]`.

    Args:
        query: rotated queries.
        key: rotated keys of the same tokens.
        value: their values.
        cache: what earlier tokens left; entries from `positions[0, 0]` on are ignored.
        positions: consecutive, the same in the whole batch.
        window: as for `causal_attention`.
        scores: as for `causal_attention`.

    Returns:
        What was attended to, and the cache with `key` and `value` in it.
    """
    start = positions[0, 0]
    new_key, new_value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    places = jnp.arange(cache.values.shape[2], dtype=jnp.int32)[None, None]
    age_before = positions[:, :, None] - places
    age_now = positions[:, :, None] - positions[:, None, :]
    before = _Keys(cache.keys, cache.values, age_before, (places < start) & _seen(age_before, window))
    now = _Keys(new_key, new_value, age_now, _seen(age_now, window))
    # The old cache is read, then written in place. XLA copies it unless the write must follow the read.
    attended = _attend(query, (before, now), scores)
    start = start + (attended[0, 0, 0, 0] * 0).astype(jnp.int32)  # + 0, which XLA cannot know
    return attended, KVCache(
        jax.lax.dynamic_update_slice(cache.keys, new_key.astype(cache.keys.dtype), (0, 0, 0, start)),
        jax.lax.dynamic_update_slice(cache.values, new_value.astype(cache.values.dtype), (0, 0, start, 0)),
    )


class _Keys(NamedTuple):
    """A run of keys, the distance of each from each query, and whether it is seen."""

    key: Float[Array, "batch kv_heads head_dim keys"]
    value: Float[Array, "batch kv_heads keys head_dim"]
    age: Int32[Array, "#batch time keys"]
    visible: Bool[Array, "#batch time keys"]


def _seen(age: Int32[Array, "#batch time keys"], window: int | None) -> Bool[Array, "#batch time keys"]:
    return age >= 0 if window is None else (age >= 0) & (age < window)


def _attend(
    query: Float[Array, "batch time heads head_dim"], parts: Sequence[_Keys], scores: Scores
) -> Float[Array, "batch time heads head_dim"]:
    """Attention to several runs of keys at once."""
    batch, time, _, head_dim = query.shape
    grouped = query.reshape(batch, time, parts[0].key.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    scale = head_dim**-0.5 if scores.scale is None else scores.scale
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def score(part: _Keys) -> Float[Array, "batch kv_heads shared time keys"]:
        raw = product("bkgtd,bkds->bkgts", grouped, part.key) * scale
        if scores.softcap is not None:
            raw = jnp.tanh(raw / scores.softcap) * scores.softcap
        if scores.slopes is not None:
            slopes = jnp.asarray(scores.slopes, jnp.float32).reshape(1, *grouped.shape[1:3], 1, 1)
            raw = raw - slopes * part.age[:, None, None].astype(jnp.float32)
        return jnp.where(part.visible[:, None, None], raw, _MASKED)

    found = [score(part) for part in parts]
    peak = reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in found])
    weights = [jnp.exp(part - peak) for part in found]
    total = reduce(jnp.add, [jnp.sum(part, axis=-1, keepdims=True) for part in weights])
    mixed = [
        product("bkgts,bksd->bkgtd", weight.astype(part.value.dtype), part.value)
        for weight, part in zip(weights, parts, strict=True)
    ]
    return (reduce(jnp.add, mixed) / total).astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _by_chunks(
    query: Array, key: Array, value: Array, mask: Array | None, window: int | None, scores: Scores = PLAIN
) -> Array:
    """One sequence after another, in chunks of queries that read only the keys they can see."""
    time = query.shape[1]
    chunk = max(_CHUNK, -(-time // _MOST_CHUNKS))

    def sequence(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        query, key, value, mask = jax.tree.map(lambda part: part[None], inputs)
        attended = []
        for start in range(0, time, chunk):
            end = min(start + chunk, time)
            first = 0 if window is None else max(0, start - window + 1)
            part = _run_of_keys(key[..., first:end], value[:, :, first:end], mask, (start, end), (first, end), window)
            attended.append(_attend(query[:, start:end], (part,), scores))
        return jnp.concatenate(attended, axis=1)[0]

    return jax.lax.map(sequence, (query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask))


def _at_once(
    query: Array, key: Array, value: Array, mask: Array | None, window: int | None, scores: Scores = PLAIN
) -> Array:
    """All queries with all keys; by JAX's own function, where it has what the scores need."""
    time = query.shape[1]
    if scores.softcap is not None or scores.slopes is not None:
        keys = (key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask)
        return _attend(query, (_run_of_keys(*keys, (0, time), (0, time), window),), scores)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function relies on it for bfloat16
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scores.scale,
            mask=None if mask is None else mask[:, None, None, :],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )


def _run_of_keys(
    key: Array, value: Array, mask: Array | None, queries: tuple[int, int], keys: tuple[int, int], window: int | None
) -> _Keys:
    """The keys of tokens `keys` as those of tokens `queries` see them, both from a first up to a last."""
    age = jnp.arange(*queries, dtype=jnp.int32)[None, :, None] - jnp.arange(*keys, dtype=jnp.int32)[None, None]
    visible = _seen(age, window)
    if mask is not None:
        visible = visible & mask[:, None, slice(*keys)]
    return _Keys(key, value, age, visible)
