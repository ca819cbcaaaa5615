from pathlib import Path

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import build

from gptq_jax.models import base
from gptq_jax.models.base import run_block
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.registry import architecture_from_config

ORACLES = Path(__file__).parents[2] / "oracles"
TINY = decoder_cases.CASES["tied_gqa"]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", decoder_cases.CASES)
def test_logits_are_those_of_transformers(name):
    expected = np.load(ORACLES / "decoder.npz")[name]
    logits = build(decoder_cases.CASES[name])(decoder_cases.tokens(name))
    assert logits.dtype == jnp.float32
    assert relative(logits, expected) < 5e-6


def test_logits_of_the_real_model_are_those_of_transformers(smollm2_gguf):
    from gptq_jax.storage.load import load

    oracle = np.load(ORACLES / "smollm2.npz")
    logits = np.asarray(load(smollm2_gguf)(oracle["tokens"][None])[0])
    assert relative(logits[:, oracle["vocabulary"]], oracle["logits"]) < 1e-4
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), oracle["logsumexp"], rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), oracle["argmax"])


@pytest.mark.parametrize("name", decoder_cases.CASES)
def test_parameters_are_hugging_faces_tensors_each_once(name):
    case = decoder_cases.CASES[name]
    architecture = architecture_from_config(case)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(architecture.abstract_params()):
        keys = tuple(entry.idx if hasattr(entry, "idx") else entry.key for entry in path)
        tensor, transposed = architecture.tensor_name(keys)
        assert tensor not in found
        found[tensor] = leaf.shape[::-1] if transposed else leaf.shape
    assert found == {tensor: value.shape for tensor, value in decoder_cases.tensors(case).items()}


def test_a_token_does_not_see_later_ones():
    model = build(TINY)
    tokens = decoder_cases.tokens("tied_gqa")
    changed = tokens.copy()
    changed[:, 20:] = (changed[:, 20:] + 1) % TINY["vocab_size"]
    before, after = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before[:, 20:] - after[:, 20:]).max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["tied_gqa", "mistral_window"])
def test_padding_is_not_attended_to(name, side):
    model = build(decoder_cases.CASES[name])
    block = model.params["layers"][0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 48)), jnp.float32)
    alone, _ = run_block(model.config, "decoder", block, x)
    junk = jnp.full((1, 5, 48), 3.0)
    padded = jnp.concatenate([junk, x] if side == "left" else [x, junk], axis=1)
    here = slice(5, 17) if side == "left" else slice(0, 12)
    mask = jnp.zeros((1, 17), bool).at[:, here].set(True)
    out, _ = run_block(model.config, "decoder", block, padded, mask=mask)
    np.testing.assert_allclose(out[:, here], alone, rtol=2e-5, atol=2e-5)
    unmasked, _ = run_block(model.config, "decoder", block, padded)
    assert (np.abs(unmasked[:, here] - alone).max() > 1e-2) == (side == "left")
    assert np.isfinite(out).all()


def test_bfloat16_keeps_its_dtype_and_comes_close():
    model = build(TINY, dtype="bfloat16")
    tokens = decoder_cases.tokens("tied_gqa")
    assert base.hidden_states(model, jnp.asarray(tokens)).dtype == jnp.bfloat16
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    assert relative(logits, np.load(ORACLES / "decoder.npz")["tied_gqa"]) < 0.03


def test_one_compilation_serves_all_blocks():
    model = build({**TINY, "num_hidden_layers": 5})
    tokens = np.zeros((3, 11), np.int32)
    before = base._run_block._cache_size()
    model(tokens)
    assert base._run_block._cache_size() == before + 1
    model(tokens + 1)
    assert base._run_block._cache_size() == before + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not supported: use one of"),
        ({"sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_bad_configs_name_the_field(fields, message):
    good = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "context_length": 8,
    }
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**good, **fields})
