"""Evaluation of a user's own language model."""

import jax
import jax.numpy as jnp
import numpy as np
import own_modules
import pytest
from flax import nnx

import gptq_jax
from gptq_jax import adapt
from gptq_jax.generate import generate_tokens

TEXT = np.random.default_rng(0).integers(0, own_modules.VOCAB, 70, dtype=np.int32)


class Wrapped(nnx.Module):
    """Logits as the first of what is returned."""

    def __init__(self):
        self.model = own_modules.in_nnx()

    def __call__(self, tokens):
        return self.model(tokens), None


def by_hand(logits, tokens):
    logits = np.asarray(logits, np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-np.mean(np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)))


@pytest.mark.parametrize("wrap", [False, True])
def test_perplexity(wrap):
    module = Wrapped() if wrap else own_modules.in_nnx()
    windows = TEXT[:60].reshape(3, 20)
    out = module(jnp.asarray(windows))
    expected = by_hand(out[0] if wrap else out, windows)
    for batch_size in (1, 2):
        found = gptq_jax.perplexity(adapt(module), TEXT, length=20, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_comparison_with_the_quantized_one():
    model = adapt(own_modules.in_nnx(), blocks="layers")
    packed, _ = gptq_jax.quantize(model, [TEXT[None, :20]], gptq_jax.QuantSpec(bits=8, group_size=16), gptq_jax.rtn())
    found = gptq_jax.compare(packed, model, TEXT, length=20)
    np.testing.assert_allclose(found.other_perplexity, gptq_jax.perplexity(model, TEXT, length=20), rtol=1e-5)
    p, q = (np.asarray(jax.nn.log_softmax(m(TEXT[:60].reshape(3, 20))), np.float64)[:, :-1] for m in (model, packed))
    np.testing.assert_allclose(found.kl, np.mean(np.sum(np.exp(p) * (p - q), -1)), rtol=2e-2, atol=1e-6)


def test_modules_that_are_no_language_models():
    linear = adapt(nnx.Sequential(nnx.Embed(64, 4, rngs=nnx.Rngs(0)), lambda x: x.sum(axis=1)))
    with pytest.raises(ValueError, match=r"Sequential returns an array of shape \(1, 4\) for tokens \[1, 20\]"):
        gptq_jax.perplexity(linear, TEXT, length=20)


@pytest.mark.parametrize("function", [gptq_jax.prepare, lambda model: generate_tokens(model, [1, 2])])
def test_what_is_for_supplied_architectures_says_so(function):
    with pytest.raises(TypeError):
        function(adapt(own_modules.in_nnx()))
