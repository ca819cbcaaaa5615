import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.models.attention import KVCache, _at_once, _by_chunks, cached_attention, causal_attention


def arrays(time, heads=6, kv_heads=2, head_dim=8, batch=2):
    rng = np.random.default_rng(time)
    shapes = [(batch, time, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def expected(query, key, value, mask=None, window=None):
    """Attention in float64, head by head."""
    query, key, value = (np.asarray(part, np.float64) for part in (query, key, value))
    batch, time, heads, head_dim = query.shape
    shared = heads // key.shape[2]
    out = np.zeros_like(query)
    age = np.arange(time)[:, None] - np.arange(time)
    for b in range(batch):
        visible = (age >= 0) & (age < (window or time))
        if mask is not None:
            visible = visible & mask[b]
        for h in range(heads):
            scores = query[b, :, h] @ key[b, :, h // shared].T / np.sqrt(head_dim)
            weights = np.where(visible, np.exp(scores), 0)
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ value[b, :, h // shared]
    return out


@pytest.mark.parametrize("implementation", [causal_attention, _by_chunks, _at_once])
@pytest.mark.parametrize("window", [None, 1, 37, 150])
@pytest.mark.parametrize("time", [1, 128, 300])
def test_every_implementation_is_the_definition(implementation, time, window):
    query, key, value = arrays(time)
    mask = np.ones((2, time), bool)
    mask[0, time // 2 :] = False  # the queries there see those before them, if the window reaches
    mask[1, 1 : time // 3] = False
    found = implementation(query, key, value, jnp.asarray(mask), window)
    with np.errstate(invalid="ignore"):
        correct = expected(query, key, value, mask, window)
    sees_something = np.isfinite(correct)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.asarray(found)[sees_something], correct[sees_something], atol=1e-5)
    found = implementation(query, key, value, None, window)
    np.testing.assert_allclose(found, expected(query, key, value, None, window), atol=1e-5)


def test_more_queries_than_chunks_hold():
    query, key, value = arrays(1500, heads=2, kv_heads=1, batch=1)
    found = causal_attention(query, key, value, None, None)
    np.testing.assert_allclose(found, expected(query, key, value), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("steps", [[20], [1] * 20, [7, 1, 8, 4]])
def test_attention_in_steps_against_a_cache(steps, window):
    query, key, value = arrays(20)
    cache = KVCache(jnp.full((2, 2, 8, 32), 9.0), jnp.full((2, 2, 32, 8), 9.0))
    found, start = [], 0
    for time in steps:
        here = slice(start, start + time)
        positions = jnp.arange(start, start + time, dtype=jnp.int32)[None]
        out, cache = cached_attention(query[:, here], key[:, here], value[:, here], cache, positions, window)
        found.append(out)
        start += time
    correct = expected(query, key, value, None, window)
    np.testing.assert_allclose(np.concatenate(found, axis=1), correct, atol=1e-5)
    np.testing.assert_array_equal(cache.keys[..., :20], key.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(cache.values[:, :, :20], value.transpose(0, 2, 1, 3))


def test_a_donated_cache_is_written_in_place():
    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    capacity = 4096
    cache = KVCache(shape(1, 2, 8, capacity), shape(1, 2, capacity, 8))
    step = jax.jit(lambda *inputs: cached_attention(*inputs, None), donate_argnums=3)
    new = [shape(1, 1, heads, 8) for heads in (6, 2, 2)]
    memory = step.lower(*new, cache, shape(1, 1, dtype=jnp.int32)).compile().memory_analysis()
    one_half = 4 * 2 * 8 * capacity
    assert memory.alias_size_in_bytes == 2 * one_half
    assert memory.temp_size_in_bytes < one_half
