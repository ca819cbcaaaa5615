"""Every spelling of the configs, and the values that cannot be read, each named by file and field."""

import json
import re
from pathlib import Path

import pytest
from packed_checkpoints import make, write

from gptq_jax import CheckpointError
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.load import load, open_source
from gptq_jax.storage.packed import awq, compressed_tensors_config, gptq_config
from gptq_jax.storage.packed.detect import packed_format

FILE = Path("DIR/config.json")
GPTQ = {"bits": 4, "group_size": 128}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
Q, HEAD = "model.layers.3.self_attn.q_proj", "lm_head"


def groups(*pairs, **more):
    entries = {f"group_{i}": {"targets": targets, "weights": {**WEIGHTS, **w}} for i, (targets, w) in enumerate(pairs)}
    return {"format": "pack-quantized", "config_groups": entries, **more}


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (GPTQ, QuantSpec(bits=4, group_size=128, symmetric=True)),
        ({"w_bit": 3, "q_group_size": -1, "sym": False}, QuantSpec(bits=3, group_size=-1, symmetric=False)),
        ({"wbits": 8, "group_size": 32, "zero_point": True}, QuantSpec(bits=8, group_size=32, symmetric=False)),
        ({"wbits": 2, "group_size": 32, "zero_point": False}, QuantSpec(bits=2, group_size=32, symmetric=True)),
        ({**GPTQ, "sym": None, "dynamic": None, "meta": None, "lm_head": None}, QuantSpec(bits=4, group_size=128)),
    ],
)
def test_spellings_of_gptq(config, spec):
    assert gptq_config.parse(config, FILE).spec_of(Q) == spec


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({}, "1 (gptq)"),
        ({"checkpoint_format": "gptq_v2"}, "2 (gptq_v2)"),
        ({"format": "gptq_v2"}, "2 (gptq_v2)"),
        ({"checkpoint_format": "gptq_p", "format": "gptq"}, "2 in bit planes (gptq_p)"),
    ],
)
def test_versions_of_gptq(change, version):
    assert gptq_config.parse({**GPTQ, **change}, FILE).version == version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin', which cannot be read: gptq, gptq_v2, gptq_p can",
        ),
        ({"format": "bitblas"}, "format is 'bitblas', which cannot be read"),
        ({"bits": 5}, "bits is 5: 2, 3, 4, 8 are supported"),
        ({"bits": "4"}, "bits is '4', not an integer"),
        ({"bits": True}, "bits is True, not an integer"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": 0}, "group_size is 0, neither positive nor -1"),
        ({"group_size": None}, "group_size is missing"),
        ({"sym": 1}, "sym is 1, not true or false"),
        ({"desc_act": "no"}, "desc_act is 'no', not true or false"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16': only int32 is supported"),
        ({"is_marlin_format": True}, "is_marlin_format is true"),
        ({"dynamic": []}, r"dynamic is [], not an object"),
        ({"dynamic": {"-:(": {}}}, "dynamic.'-:(' is no regular expression"),
        ({"dynamic": {"x" * 2000: {}}}, "longer than 1000 characters"),
        ({"dynamic": {"+:a": {"bits": 6}}}, "dynamic.+:a.bits is 6: 2, 3, 4, 8 are supported"),
        ({"dynamic": {"+:a": 3}}, "dynamic.+:a is 3, not an object"),
        ({"bits": 5, "sym": "x"}, "sym is 'x', not true or false; q.bits is 5"),
    ],
)
def test_what_gptq_cannot_say(change, message):
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        gptq_config.parse({**GPTQ, **change}, FILE, "q.")
    assert str(caught.value).startswith("DIR/config.json: q.")


def test_old_asymmetric_v1_is_unusual():
    def notes(**more):
        return gptq_config.parse({**GPTQ, "sym": False, **more}, FILE).notes

    assert "zero points may be off by one" in notes()[0]
    assert "zero points may be off by one" in notes(meta={"quantizer": ["gptqmodel:0.8.9"]})[0]
    assert notes(meta={"quantizer": ["gptqmodel:7.7.0"]}) == ()
    assert notes(checkpoint_format="gptq_v2") == ()


def test_groups_of_compressed_tensors():
    """A name goes before a regex, a regex before a class."""
    config = groups(
        (["Linear"], {}),
        (["re:.*q_proj"], {"num_bits": 8}),
        ([HEAD], {"num_bits": 3, "group_size": None, "strategy": "channel", "symmetric": False}),
        ignore=["re:.*v_proj", "model.layers.0.self_attn.q_proj"],
    )
    spec_of = compressed_tensors_config.parse(config, FILE).spec_of
    assert spec_of(Q) == QuantSpec(bits=8, group_size=128)
    assert spec_of(Q.replace("q_proj", "k_proj")) == QuantSpec(bits=4, group_size=128)
    assert spec_of(HEAD) == QuantSpec(bits=3, group_size=-1, symmetric=False)
    assert spec_of(Q.replace("q_proj", "v_proj")) is None
    assert spec_of("model.layers.0.self_attn.q_proj") is None
    assert compressed_tensors_config.parse(groups((["re:.*q_proj"], {})), FILE).spec_of(HEAD) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (groups((["Linear"], {}), format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized': of its formats"),
        (groups((["Linear"], {}), quantization_status="frozen"), "quantization_status is 'frozen', not 'compressed'"),
        (groups((["Linear"], {}), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is given: not supported"),
        (groups((["Linear"], {}), sparsity_config={"format": "sparse-24"}), "sparsity_config is not dense"),
        (groups(), "config_groups. is empty"),
        (groups((["Linear"], {"num_bits": 6})), "config_groups.group_0.weights.num_bits is 6"),
        (groups((["Linear"], {"type": "float"})), "group_0.weights.type is 'float': only int"),
        (groups((["Linear"], {"strategy": "tensor"})), "weights.strategy is 'tensor': group and channel"),
        (groups((["Linear"], {"group_size": 0})), "weights.group_size is 0, not positive"),
        (groups((["Linear"], {"dynamic": True})), "weights.dynamic is true"),
        (groups((["re:("], {})), "targets holds 're:(', which is no regular expression"),
        (groups(([3], {})), "targets holds 3, which is no name"),
        (
            {"config_groups": {"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
            "input_activations is given",
        ),
    ],
)
def test_what_compressed_tensors_cannot_say(config, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        compressed_tensors_config.parse(config, FILE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv': of AWQ's layouts, gemm is supported"),
        ({"bits": 8}, "bits is 8: AWQ has 4"),
        ({"q_group_size": 0}, "group_size is 0, neither positive nor -1"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is no list of names"),
    ],
)
def test_what_awq_cannot_say(config, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        awq.parse(config, FILE)


def test_spellings_of_awq():
    found = awq.parse({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "modules_to_not_convert": ["v_proj"]}, FILE)
    assert found.spec_of(Q) == QuantSpec(bits=4, group_size=64, symmetric=False)
    assert found.spec_of(Q.replace("q_proj", "v_proj")) is None


def opened(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    found = packed_format(open_source(directory))
    return None if found is None else found.format


@pytest.fixture
def directory(tmp_path):
    tensors, config, _ = make()
    del config["quantization_config"]
    return write(tmp_path, tensors, config)


def test_where_a_config_may_be(directory):
    hf = json.loads((directory / "config.json").read_text())
    assert opened(directory) is None
    assert opened(directory, config={**hf, "quantization_config": {**GPTQ, "quant_method": "GPTQ"}}).name == "gptq"
    assert opened(directory, config={**hf, "compression_config": groups((["Linear"], {}))}).name == "compressed-tensors"
    # AutoGPTQ's own file; what it leaves out, config.json may say.
    own = {"bits": 4, "group_size": 128, "desc_act": False}
    found = opened(directory, config=hf, quantize_config=own)
    assert (found.name, found.version, found.file) == ("gptq", "1 (gptq)", "quantize_config.json")
    both = {**hf, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert opened(directory, config=both, quantize_config={**own, "checkpoint_format": "gptq_v2"}).version[0] == "2"
    (directory / "quantize_config.json").unlink()
    assert opened(directory, config=hf, quant_config={"w_bit": 4, "version": "GEMM"}).name == "awq"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quantization_config.quant_method is 'bitsandbytes', which cannot be read: gptq,",
        ),
        ({"quant_method": 3}, "quant_method is 3, which cannot be read"),
        ({}, "quant_method is None, which cannot be read"),
        ("gptq", "quantization_config is 'gptq', not an object"),
    ],
)
def test_methods_that_cannot_be_read(directory, config, message):
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**hf, "quantization_config": config}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{re.escape(message)}"):
        load(directory)


def test_configs_that_contradict_each_other(directory):
    hf = json.loads((directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"config\.bits is 4, but quantize_config\.json has bits 3: correct"):
        opened(
            directory,
            config={**hf, "quantization_config": {**GPTQ, "quant_method": "gptq"}},
            quantize_config={"bits": 3, "group_size": 128},
        )
