"""Rotated models give the outputs they gave; what cannot be rotated says why."""

from dataclasses import replace
from functools import lru_cache

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architecture_models import float_case
from decoder_models import build
from tiny_quantization import BATCHES, float_model, rounded

from gptq_jax.generate import generate_tokens
from gptq_jax.methods import gptq
from gptq_jax.models.base import capture_block, embed
from gptq_jax.models.hadamard import hadamard_matrix
from gptq_jax.models.lora import lora, merge_lora, with_lora
from gptq_jax.models.prepared import prepare
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.pipeline import quantize, quantize_blocks
from gptq_jax.rewrites import hadamard
from gptq_jax.rewrites.hadamard import rotate_values, rotation
from gptq_jax.rewrites.scaling import scaling_groups
from gptq_jax.spec import QuantSpec
from gptq_jax.storage import load, save
from gptq_jax.storage.sink import StoreSink

ONLINE = {"values": True, "online": True}
SPEC = QuantSpec(bits=4, group_size=16, symmetric=False)
DOWN = "mlp.down_proj"
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 12), dtype=np.int32)


@pytest.mark.parametrize("size", [48, 92, 9])
def test_rotations_are_orthogonal_and_differ_by_seed(size):
    """92 and 9 have no Hadamard matrix here: 91 and 45 are no powers of primes."""
    assert (hadamard_matrix(size) is None) == (size != 48)
    np.testing.assert_allclose(rotation(size) @ rotation(size).T, np.eye(size), atol=1e-12)
    assert not np.allclose(rotation(size, 0), rotation(size, 1))


@lru_cache
def rotated_model():
    """One block, its values rotated, and the inputs of its last layer online."""
    return hadamard(**ONLINE).apply(float_model(layers=1), (), None)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *[("tied_gqa", {}), ("tied_gqa", {"online": True})],
        *[("biases", {}), ("biases", ONLINE)],
        *[("head_dim", {}), ("head_dim", {"values": True})],
    ],
)
def test_llamas_give_the_same_logits(case, options):
    check_same(float_model(case=case), options)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *[("gemma", {}), ("gemma", ONLINE)],
        *[("qwen3moe_mixed", {"values": True})],
        *[("phi3", {}), ("phi3", ONLINE)],
    ],
)
def test_other_families_give_the_same_logits(case, options, tmp_path):
    """Gains stored less one and a scaled embedding; experts beside plain blocks; fused layers."""
    check_same(float_case(case, tmp_path), options)


def check_same(model, options):
    rotated = hadamard(**options).apply(model, (), None)
    expected, found = model(TOKENS), rotated(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert rotated.config == architecture_from_config(rotated.source)
    assert rotated.config.rotated_down == ("rotated_down" in rotated.source) == options.get("online", False)
    assert jax.tree.structure(rotated.params) == jax.tree.structure(rotated.config.abstract_params())
    assert not np.allclose(rotated.params["embed"]["embedding"], model.params["embed"]["embedding"], atol=1e-2)


def test_outliers_of_one_channel_become_small_parts_of_all():
    model = float_model(layers=1)
    block = model.params["layers"][0]
    kernel = block["mlp"]["up_proj"]["kernel"].at[7].mul(50.0)
    block = {**block, "mlp": {**block["mlp"], "up_proj": {"kernel": kernel}}}
    rotated = hadamard().apply(replace(model, params={**model.params, "layers": [block]}), (), None)
    found = np.abs(rotated.params["layers"][0]["mlp"]["up_proj"]["kernel"])
    assert found.max() / found.mean() < 0.3 * float(np.abs(kernel).max() / np.abs(kernel).mean())


@pytest.mark.parametrize(
    ("case", "reason"),
    [("gpt2", "takes away the mean"), ("gemma2", "norms on what is added"), ("opt_350m", "takes away the mean")],
)
def test_what_cannot_be_rotated_says_why(case, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        hadamard().apply(float_case(case, tmp_path), (), None)


def test_a_module_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="not a supplied decoder"):
        hadamard().apply(object(), (), None)


def test_values_of_heads_in_one_layer_with_queries_and_keys(tmp_path):
    """One after another head by head, where the stream could not be rotated: it has LayerNorms."""
    model = float_case("gpt_neox", tmp_path)
    layers = [rotate_values(model.config, block) for block in model.params["layers"]]
    found = replace(model, params={**model.params, "layers": layers})
    before, after = (each.params["layers"][0]["attention"]["query_key_value"]["kernel"] for each in (model, found))
    changed = ~np.isclose(before, after, atol=1e-4).all(axis=0)
    np.testing.assert_array_equal(changed.reshape(model.config.num_heads, 3, -1).any(axis=2)[:, :2], False)
    assert changed.reshape(model.config.num_heads, 3, -1)[:, 2].all()
    expected = model(TOKENS)
    np.testing.assert_allclose(found(TOKENS), expected, atol=1e-5 * float(np.abs(expected).max()))


def test_values_are_rotated_head_by_head():
    """Each of 4 query heads, of which 2 share a value head, reads what one matrix made of its values."""
    model = float_model(layers=1, case="biases")
    before = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params["layers"][0]["self_attn"])
    after = rotate_values(model.config, model.params["layers"][0], seed=3)["self_attn"]
    turn = rotation(12, 3)
    value, bias, output = before["v_proj"]["kernel"], before["v_proj"]["bias"], before["o_proj"]["kernel"]
    heads = lambda count: [slice(12 * head, 12 * head + 12) for head in range(count)]  # noqa: E731
    expected = {
        "v_proj": np.concatenate([value[:, head] @ turn for head in heads(2)], axis=1),
        "o_proj": np.concatenate([turn.T @ output[head] for head in heads(4)]),
    }
    for name, kernel in expected.items():
        np.testing.assert_allclose(after[name]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(after["v_proj"]["bias"], np.concatenate([bias[h] @ turn for h in heads(2)]), atol=1e-6)
    for name in ("q_proj", "k_proj"):
        np.testing.assert_array_equal(after[name]["kernel"], before[name]["kernel"])


def test_the_last_layer_of_the_mlp_is_rotated_and_so_is_what_calibration_sees_of_its_input():
    plain, online = (hadamard(online=each).apply(float_model(layers=1), (), None) for each in (False, True))
    found, kernel = (each.params["layers"][0]["mlp"]["down_proj"]["kernel"] for each in (online, plain))
    turn = np.kron(np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]), hadamard_matrix(20)) / 80**0.5
    np.testing.assert_allclose(found, turn.T @ np.asarray(kernel, np.float64), atol=1e-6)
    inputs = []
    for each in (plain, online):
        stream = embed(each.config, each.params, jnp.asarray(TOKENS))
        inputs.append(capture_block(each.config, "decoder", each.params["layers"][0], stream, (DOWN,)))
    np.testing.assert_allclose(inputs[1][DOWN], np.asarray(inputs[0][DOWN], np.float64) @ turn, atol=1e-5)


def test_a_rotated_model_is_stored_quantized_and_prepared(tmp_path):
    model = rotated_model()
    save(model, tmp_path / "float")
    again = load(tmp_path / "float")
    assert (again.config, again.source) == (model.config, model.source)
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    in_memory, report = quantize(float_model(layers=1), BATCHES, SPEC, gptq()._replace(rewrite=hadamard(**ONLINE)))
    said = {"rewrite": "hadamard", "rotation_seed": 0, "rotated_values": True, "rotated_down": True}
    assert said.items() <= report.settings.items()
    down = in_memory.params["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert (down.shape, down.spec.bits) == ((80, 48), 4)
    with StoreSink(tmp_path / "packed", model) as sink:
        quantize_blocks(model, sink, BATCHES, SPEC, gptq(), devices=1)
    stored = load(tmp_path / "packed")
    for ours, theirs in zip(*map(jax.tree.leaves, (stored.params, in_memory.params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ready, expected = prepare(stored), in_memory(TOKENS)
    np.testing.assert_allclose(ready(TOKENS), expected, atol=1e-5 * float(np.abs(expected).max()))


def test_a_cache_gives_what_whole_sequences_give():
    model = prepare(rounded(rotated_model(), SPEC))
    tokens = list(generate_tokens(model, TOKENS[0], max_new_tokens=6, stop_tokens=()))
    whole = model(np.concatenate([TOKENS[0], np.array(tokens, np.int32)])[None])
    assert tokens == np.argmax(whole[0, len(TOKENS[0]) - 1 : -1], axis=-1).tolist()


def test_adapters_take_the_rotated_input():
    model = rotated_model()
    adapters = lora(model, 2, targets="down_proj")
    adapters = {path: replace(added, b=jnp.full_like(added.b, 0.1)) for path, added in adapters.items()}
    found, expected = with_lora(model, adapters)(TOKENS), merge_lora(model, adapters)(TOKENS)
    assert not np.allclose(found, model(TOKENS), atol=1e-2)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_scales_do_not_go_through_a_rotation():
    assert [group.readers for group in scaling_groups(float_model().config)][-1] == ("down",)
    assert ("down",) not in [group.readers for group in scaling_groups(rotated_model().config)]


def test_what_cannot_be_rotated_online_says_why(tmp_path):
    sizes = {**decoder_cases.CASES["tied_gqa"], "num_hidden_layers": 1, "intermediate_size": 92}
    cases = [
        (lambda: build(sizes), "no Hadamard matrix of its size 92 is known"),
        (lambda: float_case("qwen3moe_mixed", tmp_path), "each expert has one of its own"),
        (rotated_model, "is rotated already"),
    ]
    for make, reason in cases:
        with pytest.raises(ValueError, match=reason):
            hadamard(online=True).apply(make(), (), None)
