"""GPTQ exports against words made by hand, and what the format cannot hold."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from export_models import packed_model
from safetensors.numpy import load_file

from gptq_jax import QuantSpec
from gptq_jax.storage.export import export

UP = "model.layers.0.mlp.up_proj"


def unpacked(words, bits, count):
    """Codes down each column, from one long integer."""
    columns = []
    for column in np.asarray(words).view(np.uint32).T:
        stream = sum(int(word) << (32 * k) for k, word in enumerate(column))
        columns.append([stream >> (bits * k) & (2**bits - 1) for k in range(count)])
    return np.array(columns).T


def decoded(stored, module, bits, version):
    """The weight as the format defines it, in float64."""
    scales, group = stored[f"{module}.scales"].astype(np.float64), stored[f"{module}.g_idx"]
    words = np.asarray(stored[f"{module}.qzeros"]).view(np.uint32)
    if version == "gptq":
        words = words + np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
    zeros = unpacked(words.T, bits, scales.shape[1]).T
    codes = unpacked(stored[f"{module}.qweight"], bits, len(group))
    return scales[group] * (codes - zeros[group])


@pytest.mark.parametrize(
    ("version", "bits", "symmetric", "group_size", "ordered"),
    [
        ("gptq", 4, True, 32, True),
        ("gptq", 2, True, -1, True),
        ("gptq", 8, True, 16, False),
        ("gptq_v2", 4, False, 32, True),
        ("gptq_v2", 3, False, 32, False),
        ("gptq_v2", 8, False, -1, True),
    ],
)
def test_weights(tmp_path, version, bits, symmetric, group_size, ordered):
    model, weights = packed_model(QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric), ordered=ordered)
    export(model, tmp_path / "out", format=version)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored[f"{UP}.qweight"].dtype == stored[f"{UP}.qzeros"].dtype == stored[f"{UP}.g_idx"].dtype == np.int32
    assert stored[f"{UP}.scales"].dtype == np.float16
    assert f"{UP}.weight" not in stored
    for layer, weight in weights.items():
        np.testing.assert_array_equal(decoded(stored, f"model.{layer}", bits, version), weight)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group_size, symmetric)
    assert config["desc_act"] == (not ordered)
    assert config["checkpoint_format"] == version
    assert config["quant_method"] == "gptq"
    assert config["pack_dtype"] == "int32"
    assert "dynamic" not in config
    assert not config["lm_head"]


def test_symmetric_v1_as_every_loader_has_seen_it(tmp_path):
    export(packed_model()[0], tmp_path / "out", format="gptq")
    assert (load_file(tmp_path / "out/model.safetensors")[f"{UP}.qzeros"] == 0x77777777).all()


def test_no_other_tool_is_named(tmp_path):
    export(packed_model()[0], tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert [re.sub(r":.*", "", writer) for writer in config["meta"]["quantizer"]] == ["gptq-jax"]


def test_the_recipe_is_told(tmp_path):
    from dataclasses import replace

    settings = {"damping": 0.05, "static_groups": True, "true_sequential": False}
    model = replace(packed_model()[0], report={"settings": settings})
    export(model, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (config["damp_percent"], config["static_groups"], config["true_sequential"]) == (0.05, True, False)


def test_layers_on_other_grids_and_float_ones_are_named(tmp_path):
    others = {"mlp.up_proj": QuantSpec(bits=8, group_size=-1, symmetric=False), "self_attn.v_proj": None}
    model, weights = packed_model(others={**others, "lm_head": QuantSpec(group_size=32)})
    export(model, tmp_path / "out", format="gptq_v2")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["lm_head"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    float_layer = "model.layers.0.self_attn.v_proj"
    rules = config["dynamic"]
    matching = {
        module: [text for text in rules if re.match(text[2:], module)]
        for module in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_project", float_layer, "lm_head")
    }
    (up,), (value,) = matching["model.layers.0.mlp.up_proj"], matching[float_layer]
    assert up.startswith("+:")
    assert rules[up] == {"bits": 8, "group_size": -1, "sym": False}
    assert value.startswith("-:")
    assert matching["lm_head"] == matching["model.layers.0.mlp.up_project"] == []
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored[f"{float_layer}.weight"].shape == (32, 64)
    np.testing.assert_array_equal(decoded(stored, "lm_head", 4, "gptq_v2"), weights["head.lm_head"])


def test_a_short_last_group(tmp_path):
    model, weights = packed_model(QuantSpec(group_size=40))
    export(model, tmp_path / "out", format="gptq")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored[f"{UP}.scales"].shape == (2, 96)
    np.testing.assert_array_equal(decoded(stored, UP, 4, "gptq"), weights["layers.0.mlp.up_proj"])


def refusal(tmp_path, model, format):
    with pytest.raises(ValueError) as error:
        export(model, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_asymmetric_v1_is_refused(tmp_path):
    said = refusal(tmp_path, packed_model(QuantSpec(group_size=32, symmetric=False))[0], "gptq")
    assert "model.layers.0.mlp.down_proj has zero points of its own" in said
    assert "use --format gptq_v2" in said
    assert "and 3 more" in said


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_float_model_is_refused(tmp_path, format):
    from decoder_models import build
    from export_models import CONFIG

    assert "is not quantized: quantize it first, or export it with --format float" in refusal(
        tmp_path, build(CONFIG), format
    )


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_three_bits_that_fill_no_words_are_refused(tmp_path, version):
    config = {"intermediate_size": 80}
    said = refusal(tmp_path, packed_model(QuantSpec(bits=3, group_size=16), config=config)[0], version)
    for layer in ("down", "gate", "up"):
        assert f"model.layers.0.mlp.{layer}_proj: at 3 bits" in said
    assert "multiples of 32, not 80 inputs and 64 outputs" in said
    assert "self_attn" not in said


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_scales_that_are_no_float16_are_refused(tmp_path, version):
    import jax

    model, _ = packed_model(QuantSpec(group_size=32, scale_dtype="float32"))
    export(model, tmp_path / "exact", format=version)  # float32 that float16 holds
    odd = jax.tree.map(lambda leaf: leaf * jnp.float32(1 + 1e-5) if leaf.shape == (2, 96) else leaf, model.params)
    from dataclasses import replace

    said = refusal(tmp_path, replace(model, params=odd), version)
    assert "model.layers.0.mlp.up_proj: the float32 scales are not float16 numbers" in said
    assert "down_proj" not in said


def test_real_zero_points_are_refused(tmp_path):
    from dataclasses import replace

    import jax

    model, _ = packed_model(QuantSpec(group_size=32, symmetric=False))
    real = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.uint8 else leaf, model.params)
    for format in ("gptq_v2", "compressed-tensors"):
        assert "mlp.down_proj: zero points are float32" in refusal(tmp_path, replace(model, params=real), format)
