"""Causal attention with grouped queries: over a whole sequence, or over a cache of earlier keys.

Query head h attends with key head h // (query heads / key heads). Softmax is in float32.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) is not NaN
_CHUNK = 128  # queries attended together on CPU: their scores stay in the cache of the processor
_MOST_CHUNKS = 8  # they are unrolled, and compile time should not grow with the sequence


def causal_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    mask: Bool[Array, "batch time"] | None,
    window: int | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Each token attends to itself and those before it.

    Args:
        query: rotated queries.
        key: rotated keys.
        value: values.
        mask: True for tokens that may be attended to; None for all.
        window: a token attends to itself and `window - 1` before it; None for all before it.
    """
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        mask,
        cpu=partial(_by_chunks, window=window),
        default=partial(_at_once, window=window),
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
) -> tuple[Float[Array, "batch time heads head_dim"], KVCache]:
    """Each token attends to itself, those before it in `key`, and cached ones before `positions[0, 0]`.

    Args:
        query: rotated queries.
        key: rotated keys of the same tokens.
        value: their values.
        cache: what earlier tokens left; entries from `positions[0, 0]` on are ignored.
        positions: consecutive, the same in the whole batch.
        window: as for `causal_attention`.

    Returns:
        What was attended to, and the cache with `key` and `value` in it.
    """
    start = positions[0, 0]
    new_key, new_value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    places = jnp.arange(cache.values.shape[2], dtype=jnp.int32)[None, None]
    seen_before = (places < start) & _seen(positions[:, :, None] - places, window)
    seen_now = _seen(positions[:, :, None] - positions[:, None, :], window)
    # The old cache is read, then written in place. XLA copies it unless the write must follow the read.
    attended = _attend(query, ((cache.keys, cache.values, seen_before), (new_key, new_value, seen_now)))
    start = start + (attended[0, 0, 0, 0] * 0).astype(jnp.int32)  # + 0, which XLA cannot know
    return attended, KVCache(
        jax.lax.dynamic_update_slice(cache.keys, new_key.astype(cache.keys.dtype), (0, 0, 0, start)),
        jax.lax.dynamic_update_slice(cache.values, new_value.astype(cache.values.dtype), (0, 0, start, 0)),
    )


def _seen(age: Int32[Array, "#batch time keys"], window: int | None) -> Bool[Array, "#batch time keys"]:
    return age >= 0 if window is None else (age >= 0) & (age < window)


def _attend(
    query: Float[Array, "batch time heads head_dim"], parts: Sequence[tuple[Array, Array, Array]]
) -> Float[Array, "batch time heads head_dim"]:
    """Attention to several runs of keys at once, each (key [batch, kv_heads, head_dim, keys], value [batch,
    kv_heads, keys, head_dim], visible [batch or 1, time, keys]).
    """
    batch, time, _, head_dim = query.shape
    grouped = query.reshape(batch, time, parts[0][0].shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = [
        jnp.where(visible[:, None, None], product("bkgtd,bkds->bkgts", grouped, key) * head_dim**-0.5, _MASKED)
        for key, _, visible in parts
    ]
    peak = reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in scores])
    weights = [jnp.exp(part - peak) for part in scores]
    total = reduce(jnp.add, [jnp.sum(part, axis=-1, keepdims=True) for part in weights])
    mixed = [
        product("bkgts,bksd->bkgtd", part.astype(value.dtype), value)
        for part, (_, value, _) in zip(weights, parts, strict=True)
    ]
    return (reduce(jnp.add, mixed) / total).astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _by_chunks(query: Array, key: Array, value: Array, mask: Array | None, window: int | None) -> Array:
    """One sequence after another, in chunks of queries that read only the keys they can see."""
    time = query.shape[1]
    chunk = max(_CHUNK, -(-time // _MOST_CHUNKS))

    def sequence(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        query, key, value, mask = jax.tree.map(lambda part: part[None], inputs)
        attended = []
        for start in range(0, time, chunk):
            end = min(start + chunk, time)
            first = 0 if window is None else max(0, start - window + 1)
            queries, keys = jnp.arange(start, end, dtype=jnp.int32), jnp.arange(first, end, dtype=jnp.int32)
            visible = _seen(queries[None, :, None] - keys[None, None], window)
            if mask is not None:
                visible = visible & mask[:, None, first:end]
            part = (key[..., first:end], value[:, :, first:end], visible)
            attended.append(_attend(query[:, start:end], (part,)))
        return jnp.concatenate(attended, axis=1)[0]

    return jax.lax.map(sequence, (query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask))


def _at_once(query: Array, key: Array, value: Array, mask: Array | None, window: int | None) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function relies on it for bfloat16
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask[:, None, None, :],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
