"""Whole directories: other tools' against what those tools make of them, ours against weights written bit by bit."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_checkpoints import HEAD, MODULES, make, write
from safetensors.numpy import save_file

from gptq_jax import CheckpointError, QuantizedTensor, load
from gptq_jax.inspection import inspect_model, inspection_table
from gptq_jax.storage.store import packed_layers, save

ORACLES = Path(__file__).resolve().parents[3] / "oracles" / "packed"
NAMES = (
    "awq_gemm",
    "ct_w3_channel",
    "ct_w4_asym",
    "ct_w4_sym",
    "gptq_v1_dynamic",
    "gptq_v1_w8",
    "gptq_v2_w2",
    "gptq_v2_w3",
)
GPTQMODEL = ("g3_planar", "g3_sym_v1", "g4_asym_v2", "g4_asym_zero0_v2", "g4_desc_v1", "g4_sym_v1", "g4_sym_v2")


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def half_precision_weights(model):
    """The model on float weights that were rounded to float16, as GPTQModel computes them."""
    params = jax.tree.map(
        lambda leaf: leaf.dequantize(jnp.float16).astype(jnp.float32) if is_packed(leaf) else leaf,
        model.params,
        is_leaf=is_packed,
    )
    return replace(model, params=params)


def hf_name(path):
    return path.removeprefix("head.") if path.startswith("head.") else f"model.{path}"


@pytest.mark.parametrize("name", NAMES)
def test_other_tools_checkpoints(name):
    model = load(ORACLES / name)
    reference = np.load(ORACLES / name / "ref.npz")
    packed = packed_layers(model.params)
    assert {hf_name(path) for path in packed} == set(reference.files) - {"tokens", "logits"}
    for path, tensor in packed.items():
        np.testing.assert_array_equal(tensor.dequantize(jnp.float16), reference[hf_name(path)], err_msg=path)
    tokens, expected = reference["tokens"].astype(np.int32), reference["logits"]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(half_precision_weights(model)(tokens), expected, atol=1e-5 * largest)
    # And the packed weights themselves, which are not rounded to float16.
    np.testing.assert_allclose(model(tokens), expected, atol=2e-3 * largest)


@pytest.mark.parametrize("name", GPTQMODEL)
def test_gptqmodels_checkpoints(shared_dir, name):
    directory = shared_dir / "fixtures" / "gptqmodel" / name
    if not directory.is_dir():
        pytest.skip("no fixtures of GPTQModel in ../shared")
    model, reference = load(directory), np.load(directory / "ref.npz")
    module = str(reference["deq_name"]).removeprefix("model.")
    np.testing.assert_array_equal(packed_layers(model.params)[module].dequantize(jnp.float16), reference["deq_w"])
    logits = half_precision_weights(model)(reference["tokens"].astype(np.int32))
    np.testing.assert_allclose(logits, reference["logits_f32"], atol=1e-3)


CASES = [
    ("gptq", 4, 16, True),
    ("gptq", 2, -1, False),
    ("gptq_v2", 3, 32, False),
    ("gptq_v2", 8, 16, True),
    ("compressed-tensors", 4, -1, False),
    ("compressed-tensors", 3, 16, True),
    ("awq", 4, 16, False),
]


@pytest.mark.parametrize(("form", "bits", "group_size", "symmetric"), CASES)
def test_weights_written_bit_by_bit(tmp_path, form, bits, group_size, symmetric):
    tensors, config, weights = make(form, bits, group_size, symmetric)
    model = load(write(tmp_path / "in", tensors, config))
    packed = packed_layers(model.params)
    assert {f"model.{path}" for path in packed} == set(weights)
    for path, tensor in packed.items():
        np.testing.assert_allclose(tensor.dequantize(), weights[f"model.{path}"], rtol=1e-6)
        assert (tensor.spec.bits, tensor.spec.group_size, tensor.spec.symmetric) == (bits, group_size, symmetric)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    assert "quantization_config" not in model.source
    save(model, tmp_path / "store")
    again = load(tmp_path / "store")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert jax.tree.map(lambda leaf: leaf.dtype, model.params) == jax.tree.map(lambda leaf: leaf.dtype, again.params)


def test_float_parameters_take_the_dtype_asked_for(tmp_path):
    model = load(write(tmp_path, *make()[:2]), dtype="bfloat16")
    assert model.params["embed"]["embedding"].dtype == jnp.bfloat16
    assert {tensor.scales.dtype for tensor in packed_layers(model.params).values()} == {jnp.dtype(jnp.float16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_head(tmp_path, dtype):
    """Logits are float32 whatever the residual stream is."""
    tensors, config, weights = make(modules={**MODULES, **HEAD})
    config["quantization_config"]["lm_head"] = True
    path = write(tmp_path / "in", tensors, config)
    model = load(path, dtype=dtype)
    assert is_packed(model.params["head"]["lm_head"]["kernel"])
    tokens = np.arange(12, dtype=np.int32)[None]
    exact = load(path)
    head = {**exact.params["head"], "lm_head": {"kernel": jnp.asarray(weights["lm_head"], jnp.float32)}}
    expected = replace(exact, params={**exact.params, "head": head})(tokens)
    assert model(tokens).dtype == jnp.float32
    relative = 1e-5 if dtype == "float32" else 0.03
    np.testing.assert_allclose(model(tokens), expected, atol=relative * float(jnp.abs(expected).max()))
    save(model, tmp_path / "store")
    np.testing.assert_array_equal(load(tmp_path / "store")(tokens), model(tokens))
    result = inspect_model(str(path))
    assert [layer["path"] for layer in result["layers"]][-1] == "head.lm_head"
    assert "the output head (lm_head) is quantized" in result["format"]["unusual"]


def test_dynamic_overrides_in_order(tmp_path):
    """The first pattern that matches decides; one without a sign overrides too."""
    tensors, config, weights = make(bits=4)
    others = make(bits=8, group_size=-1)[0]
    down = [name for name in tensors if ".down_proj." in name]
    tensors = {name: values for name, values in tensors.items() if ".gate_proj." not in name}
    tensors |= {name: others[name] for name in down}
    for name, weight in weights.items():
        if name.endswith("gate_proj"):
            tensors[f"{name}.weight"] = weight.T.astype(np.float16)
    config["quantization_config"]["dynamic"] = {
        r"-:model\.layers\.\d\.mlp\.gate_proj": {},
        r".*down_proj": {"bits": 8, "group_size": -1},
        r"+:.*mlp": {"bits": 2},
        r"+:.*up_proj": {"bits": 3},
    }
    with pytest.raises(
        CheckpointError, match=r"up_proj\.qweight has shape \(4, 64\), not \(2, 64\): it is 4 bits wide"
    ):
        load(write(tmp_path, tensors, config))
    del config["quantization_config"]["dynamic"]["+:.*mlp"]
    config["quantization_config"]["dynamic"]["+:.*up_proj"] = {"sym": False}
    model = load(write(tmp_path, tensors, config))
    specs = {path.split(".", 2)[2]: tensor.spec for path, tensor in packed_layers(model.params).items()}
    assert (specs["mlp.down_proj"].bits, specs["mlp.down_proj"].group_size) == (8, -1)
    assert specs["mlp.up_proj"].bits == 4
    assert "mlp.gate_proj" not in specs


def biases(values):
    return {f"{name}.bias": np.full(shape[1], values, np.float16) for name, shape in MODULES.items() if "attn" in name}


def test_biases(tmp_path):
    tensors, config, _ = make()
    config["attention_bias"] = True
    model = load(write(tmp_path, {**tensors, **biases(0.5)}, config))
    attention = model.params["layers"][1]["self_attn"]
    assert all((attention[name]["bias"] == 0.5).all() for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert is_packed(attention["q_proj"]["kernel"])


def test_biases_the_model_has_not(tmp_path):
    """AutoGPTQ stored one for every module; zeros say nothing, others would be lost."""
    tensors, config, _ = make()
    path = write(tmp_path, {**tensors, **biases(0)}, config)
    assert "bias" not in load(path).params["layers"][0]["self_attn"]["q_proj"]
    assert any("bias of zeros" in note for note in inspect_model(str(path))["format"]["unusual"])
    with pytest.raises(CheckpointError, match=r"k_proj\.bias belongs to no part of this architecture"):
        load(write(tmp_path, {**tensors, **biases(0.5)}, config))


def test_shards_and_autogptqs_names(tmp_path):
    tensors, config, _ = make()
    whole = load(write(tmp_path / "whole", tensors, config))
    settings = config.pop("quantization_config")
    for name in ("one", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        del settings["quant_method" if name == "shards" else "desc_act"]  # AutoGPTQ's own file needs neither
        (tmp_path / name / "quantize_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "one" / "gptq_model-4bit-16g.safetensors")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "one" / "other.safetensors")
    names = sorted(tensors)
    placed = {}
    for part, start in enumerate(range(0, len(names), 20), 1):
        file = f"gptq_model-4bit-16g-{part:05}-of-00005.safetensors"
        save_file({name: tensors[name] for name in names[start : start + 20]}, tmp_path / "shards" / file)
        placed |= dict.fromkeys(names[start : start + 20], file)
    index = tmp_path / "shards" / "gptq_model-4bit-16g.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for name in ("one", "shards"):
        jax.tree.map(np.testing.assert_array_equal, whole.params, load(tmp_path / name).params)
    (tmp_path / "shards" / file).unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: names shard '{file}', which is not there"):
        load(tmp_path / "shards")


def broken(tensors, **changed):
    """`tensors` with some replaced; None leaves one out. In names, __ stands for a dot."""
    found = {**tensors, **{name.replace("__", "."): values for name, values in changed.items()}}
    return {name: values for name, values in found.items() if values is not None}


Q = "model.layers.0.self_attn.q_proj"
D = "model.layers.1.mlp.down_proj"
nan_scales = np.full((2, 32), np.nan, np.float16)
BAD = {  # what is changed in a 4-bit gptq_v2 checkpoint in groups of 16 -> the error
    "rows of qweight": (
        {f"{Q}.qweight": np.zeros((5, 32), np.int32)},
        rf"{Q}\.qweight has shape \(5, 32\), not \(4, 32\)",
    ),
    "bits of qweight": (
        {f"{Q}.qweight": np.zeros((8, 32), np.int32)},
        rf"{Q}\.qweight has shape \(8, 32\), not \(4, 32\): it is 8 bits wide, but config\.json says 4",
    ),
    "outputs of scales": (
        {f"{Q}.scales": np.ones((2, 31), np.float16)},
        rf"{Q}\.scales has shape \(2, 31\), not \(2, 32\)",
    ),
    "groups of zeros": ({f"{D}.qzeros": np.zeros((2, 4), np.int32)}, rf"{D}\.qzeros has shape \(2, 4\), not \(4, 4\)"),
    "length of g_idx": ({f"{D}.g_idx": np.zeros(63, np.int32)}, rf"{D}\.g_idx has shape \(63,\), not \(64,\)"),
    "g_idx too high": ({f"{D}.g_idx": np.full(64, 4, np.int32)}, rf"{D}: g_idx spans 4 to 4, but there are 4 groups"),
    "g_idx below zero": ({f"{D}.g_idx": np.full(64, -1, np.int32)}, rf"{D}: g_idx spans -1 to -1, but there are 4"),
    "NaN": ({f"{Q}.scales": nan_scales}, rf"{Q}: 64 of 64 scales are NaN or infinity"),
    "dtype of scales": ({f"{Q}.scales": np.ones((2, 32), np.int16)}, rf"{Q}\.scales is I16, not F16 or BF16 or F32"),
    "dtype of codes": ({f"{Q}.qweight": np.zeros((4, 32), np.float32)}, rf"{Q}\.qweight is F32, not I32 or U32"),
    "a tensor missing": ({f"{Q}.scales": None}, rf"{Q}\.scales is missing"),
    "codes missing": ({f"{Q}.qweight": None}, rf"{Q}\.qweight is missing"),
    "stored twice": (
        {f"{Q}.weight": np.zeros((32, 32), np.float16)},
        rf"{Q} is stored twice, as qweight and as a float",
    ),
    "left over": (
        {"model.layers.7.mlp.up_proj.qweight": np.zeros(3, np.int32)},
        r"layers\.7\.mlp\.up_proj\.qweight belongs to",
    ),
    "float of integers": (
        {"model.norm.weight": np.ones(32, np.int32)},
        r"model\.norm\.weight is I32, not a float weight",
    ),
    "NaN norm": ({"model.norm.weight": np.full(32, np.nan, np.float32)}, r"'model\.norm\.weight' holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_named(tmp_path, case):
    changed, message = BAD[case]
    tensors, config, _ = make()
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, broken(tensors, **changed), config))


def test_several_problems_are_one_error(tmp_path):
    tensors, config, _ = make()
    shapes = broken(tensors, **{f"{Q}.scales": None, f"{D}.g_idx": np.zeros(3, np.int32)})
    with pytest.raises(CheckpointError, match=rf"{Q}\.scales is missing; {D}\.g_idx has shape \(3,\)"):
        load(write(tmp_path, shapes, config))
    values = broken(tensors, **{f"{Q}.scales": nan_scales, f"{D}.g_idx": np.full(64, 9, np.int32)})
    with pytest.raises(CheckpointError, match=rf"{Q}: 64 of 64 scales .*; {D}: g_idx spans 9 to 9"):
        load(write(tmp_path, values, config))


def test_packed_where_the_config_leaves_float(tmp_path):
    tensors, config, _ = make()
    config["quantization_config"]["dynamic"] = {rf"-:{Q}": {}}
    with pytest.raises(CheckpointError, match=rf"{Q} is packed, but config\.json leaves it float"):
        load(write(tmp_path, tensors, config))


def test_weight_shape_of_compressed_tensors(tmp_path):
    tensors, config, _ = make("compressed-tensors")
    tensors[f"{Q}.weight_shape"] = np.array([32, 31], np.int64)
    with pytest.raises(CheckpointError, match=rf"{Q}: weight_shape holds \[32, 31\], not \[32, 32\]"):
        load(write(tmp_path, tensors, config))


def test_more_layers_than_tensors(tmp_path):
    tensors, config, _ = make()
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1000000000, but there are \d+ tensors"):
        load(write(tmp_path, tensors, {**config, "num_hidden_layers": 10**9}))


def test_unknown_architecture(tmp_path):
    tensors, config, _ = make()
    with pytest.raises(CheckpointError, match=r"config\.json: model_type 'falcon' is not supported: use one of"):
        load(write(tmp_path, tensors, {**config, "model_type": "falcon"}))


def test_pickle_is_never_opened(tmp_path):
    _, config, _ = make()
    for suffix in ("bin", "pt"):
        (tmp_path / f"gptq_model-4bit-128g.{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointError, match=rf"4bit-128g\.{suffix} but no safetensors; pickle .*never opened.*convert"
        ):
            load(tmp_path)
        (tmp_path / f"gptq_model-4bit-128g.{suffix}").unlink()


@pytest.mark.parametrize(
    ("name", "version", "unusual"),
    [
        ("gptq_v1_dynamic", "1 (gptq)", ("dynamic has 3 patterns", "(lm_head) is quantized", "activation order")),
        ("gptq_v2_w2", "2 (gptq_v2)", ()),
        ("ct_w4_asym", "pack-quantized", ()),
        ("awq_gemm", "gemm", ()),
    ],
)
def test_inspect(name, version, unusual):
    result = inspect_model(str(ORACLES / name))
    assert result["format"]["version"] == version
    assert all(any(text in note for note in result["format"]["unusual"]) for text in unusual)
    assert result["quantized_layers"] == len(packed_layers(load(ORACLES / name).params))
    shown = [part for part in inspection_table(result) if isinstance(part, str)]
    assert f"format: {result['format']['name']}, version {version}" in shown
    assert len([line for line in shown if line.startswith("unusual: ")]) == len(result["format"]["unusual"])


def test_inspect_names_v1_in_name_only(tmp_path):
    tensors, config, _ = make("gptq_v2", symmetric=True)
    config["quantization_config"]["checkpoint_format"] = "gptq"
    notes = inspect_model(str(write(tmp_path, tensors, config)))["format"]["unusual"]
    assert len(notes) == 1
    assert notes[0].startswith("claims gptq v1 but stores true zeros: model.layers.0.")
    assert notes[0].endswith("and 13 more")
