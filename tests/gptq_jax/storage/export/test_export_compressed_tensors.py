"""compressed-tensors exports against words made by hand, and what the format cannot hold."""

import json
import re

import numpy as np
import pytest
from export_models import packed_model
from packed_checkpoints import bit_stream
from safetensors.numpy import load_file

from gptq_jax import QuantSpec
from gptq_jax.storage.export import export

UP = "model.layers.0.mlp.up_proj"


def quantization(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"), [(4, True, 32), (4, False, -1), (3, False, 32), (8, True, 16)]
)
def test_weights(tmp_path, bits, symmetric, group_size):
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    model, weights = packed_model(spec)
    export(model, tmp_path / "out", format="compressed-tensors")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name.removeprefix(UP) for name in stored if name.startswith(UP)} == {
        ".weight_packed",
        ".weight_scale",
        ".weight_shape",
        *([] if symmetric else [".weight_zero_point"]),
    }
    for layer, weight in weights.items():
        module = f"model.{layer}"
        d_out, d_in = stored[f"{module}.weight_shape"].tolist()
        assert (d_in, d_out) == weight.shape
        scales = stored[f"{module}.weight_scale"].astype(np.float64).repeat(spec.group_rows(d_in), axis=1)
        if symmetric:
            zeros = np.full((d_out, d_in), 2 ** (bits - 1))
        else:
            packed = stored[f"{module}.weight_zero_point"]
            zeros = np.stack([codes(column, bits, d_out) for column in packed.T], axis=1)
            zeros = zeros.repeat(spec.group_rows(d_in), axis=1)
        found = np.stack([codes(row, bits, d_in) for row in stored[f"{module}.weight_packed"]])
        np.testing.assert_array_equal(((found - zeros) * scales).T, weight)
    group = quantization(tmp_path / "out")["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    assert quantization(tmp_path / "out")["ignore"] == ["lm_head"]


def codes(words, bits, count):
    single = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")[: count * bits]
    found = single.reshape(count, bits) @ (1 << np.arange(bits))
    np.testing.assert_array_equal(bit_stream(found, bits), np.asarray(words).view(np.uint32))
    return found


def test_groups_of_modules(tmp_path):
    others = {
        "mlp.up_proj": QuantSpec(bits=8, group_size=-1),
        "self_attn.v_proj": None,
        "lm_head": QuantSpec(group_size=32),
    }
    export(packed_model(others=others)[0], tmp_path / "out", format="compressed-tensors")
    config = quantization(tmp_path / "out")
    assert config["ignore"] == ["model.layers.0.self_attn.v_proj"]
    groups = list(config["config_groups"].values())
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]
    for module, bits in ((UP, 8), ("lm_head", 4), ("model.layers.0.self_attn.q_proj", 4)):
        found = [
            group["weights"]["num_bits"]
            for group in groups
            if any(re.match(target.removeprefix("re:"), module) for target in group["targets"])
        ]
        assert found == [bits]


def test_a_tied_head_is_ignored(tmp_path):
    export(packed_model(config={"tie_word_embeddings": True})[0], tmp_path / "out", format="compressed-tensors")
    assert quantization(tmp_path / "out")["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_a_group_longer_than_the_column_is_the_column(tmp_path):
    export(packed_model(QuantSpec(group_size=128))[0], tmp_path / "out", format="compressed-tensors")
    (group,) = quantization(tmp_path / "out")["config_groups"].values()
    assert group["weights"]["strategy"] == "channel"


@pytest.mark.parametrize(
    ("spec", "ordered", "reason"),
    [
        (QuantSpec(group_size=40), True, "down_proj: 96 inputs are no multiple of the group size 40"),
        (QuantSpec(group_size=32), False, "down_proj: rows are in activation order"),
    ],
)
def test_refusals(tmp_path, spec, ordered, reason):
    with pytest.raises(ValueError, match=f"this format cannot hold the model: .*{reason}"):
        export(packed_model(spec, ordered=ordered)[0], tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
