"""Adapters on disk: PEFT's names and shapes, the same values back, damaged files refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_quantization import BATCHES, float_model

import gptq_jax
from gptq_jax import CheckpointError, load_lora, lora, merge_lora, save_lora, with_lora
from gptq_jax.models.base import Model
from gptq_jax.models.registry import architecture_from_config

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def model():
    return float_model()


@pytest.fixture
def saved(model, tmp_path):
    adapters = lora(model, 4, targets="q_proj|o_proj", alpha=6.0)
    save_lora(adapters, model, tmp_path / "adapters")
    return adapters, tmp_path / "adapters"


def test_names_and_shapes_are_those_of_peft(saved):
    adapters, path = saved
    tensors, config = load_file(path / TENSORS), json.loads((path / CONFIG).read_text())
    added = adapters["layers.1.self_attn.o_proj"]
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    np.testing.assert_array_equal(tensors[name.format("A")], np.asarray(added.a).T)
    np.testing.assert_array_equal(tensors[name.format("B")], np.asarray(added.b).T)
    assert len(tensors) == 2 * len(adapters) == 8
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 6, False)
    assert "model.layers.1.self_attn.o_proj" in config["target_modules"]


def test_the_same_adapters_back(model, saved):
    adapters, path = saved
    found = load_lora(path, model)
    assert found.keys() == adapters.keys()
    for layer, added in adapters.items():
        assert found[layer].scale == added.scale
        np.testing.assert_array_equal(found[layer].a, added.a)
        np.testing.assert_array_equal(found[layer].b, added.b)


def test_conv1d_is_fan_in_fan_out(tmp_path):
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 48}
    architecture = architecture_from_config(config)

    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), architecture.abstract_params())
    model = Model(architecture, params, None, config)
    save_lora(lora(model, 2, targets="c_attn"), model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 2)


def test_merged_export_is_the_adapted_model(model, tmp_path):
    rng = np.random.default_rng(0)
    adapters = {
        layer: type(added)(
            a=added.a, b=added.b + rng.normal(size=added.b.shape, scale=0.1).astype("float32"), scale=added.scale
        )
        for layer, added in lora(model, 2).items()
    }
    gptq_jax.export(merge_lora(model, adapters), tmp_path / "out", format="float", dtype="float32")
    logits = gptq_jax.load(tmp_path / "out")(BATCHES[0])
    np.testing.assert_allclose(logits, with_lora(model, adapters)(BATCHES[0]), rtol=2e-4, atol=2e-5)


def test_rank_stabilized_adapters_of_peft(model, saved):
    _, path = saved
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "use_rslora": True}))
    assert load_lora(path, model)["layers.0.self_attn.q_proj"].scale == 3.0  # alpha / sqrt(r)


def test_what_cannot_be_saved(model, tmp_path, saved):
    with pytest.raises(ValueError, match="adapters is empty"):
        save_lora({}, model, tmp_path / "none")
    mixed = {**lora(model, 2, targets="q_proj"), **lora(model, 4, targets="o_proj")}
    with pytest.raises(ValueError, match="several ranks and scales"):
        save_lora(mixed, model, tmp_path / "mixed")
    adapters, path = saved
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        save_lora(adapters, model, path)
    save_lora(adapters, model, path, overwrite=True)


def config_with(**changes):
    def change(path):
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def tensors_with(edit):
    def change(path):
        tensors = load_file(path / TENSORS)
        edit(tensors)
        save_file(tensors, path / TENSORS)

    return change


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config_with(use_dora=True), "use_dora is True: only plain LoRA"),
        (config_with(peft_type="IA3"), "peft_type is 'IA3': only LORA"),
        (config_with(r=0), "r is not a positive number"),
        (config_with(r=3), r"lora_A.weight' has shape \(4, \d+\), but r is 3"),
        (config_with(lora_alpha="8"), "lora_alpha is '8', not a positive number"),
        (tensors_with(lambda tensors: tensors.pop(A)), r"layers\.0\.self_attn\.q_proj has lora_B only"),
        (tensors_with(lambda tensors: tensors.update({A: tensors[A][:, :3].copy()})), "but that layer has"),
        (tensors_with(lambda tensors: tensors.update({A: tensors[A] * np.float32("nan")})), "holds NaN or infinity"),
        (tensors_with(lambda tensors: tensors.update(other=np.zeros(2))), "tensor 'other' is no adapter of a layer"),
        (lambda path: (path / TENSORS).write_bytes(b"\x08"), TENSORS),
        (lambda path: (path / CONFIG).unlink(), "adapter_config.json.*does not exist"),
    ],
)
def test_damaged(model, saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_lora(path, model)
