"""Adapters: nothing at first, then what the float model with `scale * a @ b` in its weights gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_quantization import BATCHES, float_model

import gptq_jax
from gptq_jax import QuantSpec, lora, merge_lora, rtn, with_lora
from gptq_jax.generate import Sampling, generate_tokens
from gptq_jax.hooks.low_rank import LowRank

TOKENS = BATCHES[0]


@pytest.fixture(scope="module")
def model():
    return gptq_jax.quantize(float_model(), BATCHES, QuantSpec(bits=4, group_size=16), rtn())[0]


def trained(adapters, seed=0):
    """With `b` as training might leave it."""
    rng = np.random.default_rng(seed)
    return {
        path: replace(added, b=jnp.asarray(rng.normal(size=added.b.shape, scale=0.1), added.b.dtype))
        for path, added in adapters.items()
    }


def test_new_adapters_change_nothing(model):
    adapters = lora(model, 4)
    assert len(adapters) == 14
    assert adapters["layers.1.mlp.down_proj"].scale == 2
    np.testing.assert_array_equal(with_lora(model, adapters)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("prepared", [False, True])
def test_as_with_their_product_in_the_weights(model, prepared):
    """In a prepared model too, where q, k and v are one product; packed layers without adapters stay as they are."""
    adapters = trained(lora(model, 3, targets="q_proj|down_proj", alpha=4.0))
    expected = merge_lora(model, adapters)
    kernel = expected.params["layers"][0]["self_attn"]["q_proj"]["kernel"]
    added = adapters["layers.0.self_attn.q_proj"]
    by_hand = model.params["layers"][0]["self_attn"]["q_proj"]["kernel"].dequantize() + 4 / 3 * added.a @ added.b
    np.testing.assert_allclose(kernel, by_hand, rtol=1e-6, atol=1e-7)
    found = with_lora(gptq_jax.prepare(model) if prepared else model, adapters)
    np.testing.assert_allclose(found(TOKENS), expected(TOKENS), rtol=2e-4, atol=2e-5)
    assert np.abs(found(TOKENS) - model(TOKENS)).max() > 1e-2


def test_generation_against_the_cache(model):
    """Drawn with the same random numbers, since greedy text of a tiny model repeats itself."""
    adapters = trained(lora(model, 4))

    def drawn(model):
        sampling = Sampling(temperature=20.0)
        return list(generate_tokens(model, [5, 7, 11], max_new_tokens=12, sampling=sampling, stop_tokens=()))

    found = drawn(with_lora(model, adapters))
    assert found == drawn(merge_lora(model, adapters))
    assert found != drawn(model)


def loss_of(model, tokens):
    logits = model(tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def test_gradients_are_those_of_the_float_model(model):
    """Through the packed product, against differentiation of the dequantized weights with the adapters in them."""
    adapters, tokens = trained(lora(model, 2, targets="v_proj|gate_proj")), jnp.asarray(TOKENS)
    found = jax.grad(lambda adapters: loss_of(with_lora(model, adapters), tokens))(adapters)
    expected = jax.grad(lambda adapters: loss_of(merge_lora(model, adapters), tokens))(adapters)
    for path, gradient in found.items():
        for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[path]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-6)
            assert np.abs(theirs).max() > 0


def test_training_lowers_the_loss_and_leaves_the_model(model):
    before = jax.tree.map(np.asarray, model.params)
    tokens, optimizer = jnp.asarray(TOKENS), optax.adam(1e-2)
    adapters = lora(model, 4)
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state):
        loss, gradients = jax.value_and_grad(lambda adapters: loss_of(with_lora(model, adapters), tokens))(adapters)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, loss

    losses = []
    for _ in range(15):
        adapters, state, loss = step(adapters, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, model.params))


def test_a_float_model_has_adapters_too():
    model = float_model()
    adapters = trained(lora(model, 2, targets=r"layers\.1\."))
    assert set(adapters) == {path for path in lora(model, 2) if path.startswith("layers.1.")}
    np.testing.assert_allclose(
        with_lora(model, adapters)(TOKENS), merge_lora(model, adapters)(TOKENS), rtol=2e-4, atol=2e-5
    )


def test_adapters_are_replaced_not_added(model):
    one, other = trained(lora(model, 2)), trained(lora(model, 2, targets="o_proj"), seed=1)
    twice = with_lora(with_lora(model, one), other)
    np.testing.assert_array_equal(twice(TOKENS), with_lora(model, other)(TOKENS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0 must be positive"),
        ({"rank": 4, "alpha": float("nan")}, "alpha=nan must be positive"),
        ({"rank": 4, "targets": "qkv"}, r"targets='qkv' matches no layer: they are named like 'layers\.0\."),
    ],
)
def test_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora(model, **arguments)


def test_adapters_of_another_model(model):
    wrong = LowRank(a=jnp.zeros((3, 2)), b=jnp.zeros((2, 5)), scale=1.0)
    with pytest.raises(ValueError, match=r"q_proj has d_in and d_out of \(3, 5\), but that layer has \(\d+, \d+\)"):
        with_lora(model, {"layers.0.self_attn.q_proj": wrong})
    with pytest.raises(ValueError, match="but that layer is not among the model's layers"):
        with_lora(model, {"layers.7.self_attn.q_proj": wrong})


def test_what_would_lose_adapters_is_refused(model, tmp_path):
    adapted = with_lora(model, lora(model, 2))
    with pytest.raises(ValueError, match=r"carries LoRA adapters, and cannot be saved: .* merge_lora first"):
        gptq_jax.save(adapted, tmp_path / "saved")
    with pytest.raises(ValueError, match="cannot be exported"):
        gptq_jax.export(adapted, tmp_path / "exported", format="float")
    floating = float_model()
    with pytest.raises(ValueError, match="cannot be quantized"):
        gptq_jax.quantize(with_lora(floating, lora(floating, 2)), BATCHES)
    with pytest.raises(ValueError, match="prepared to run here: merge into the model it was prepared from"):
        merge_lora(gptq_jax.prepare(model), lora(model, 2))
    assert not list(tmp_path.iterdir())
