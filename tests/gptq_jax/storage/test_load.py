import json

import decoder_cases
import gguf_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.gguf import GgufFile
from gptq_jax.storage.load import load, open_source, read_params
from gptq_jax.storage.safetensors import SafetensorsDirectory


def checkpoint(directory, case="untied_mha", *, config=None, drop=(), **tensors):
    """A Hugging Face directory of a tiny decoder; `tensors` are added or replaced, `drop` left out."""
    config = {**decoder_cases.CASES[case], **(config or {})}
    (directory / "config.json").write_text(json.dumps(config))
    found = {**decoder_cases.tensors(decoder_cases.CASES[case]), **tensors}
    save_file({name: found[name] for name in found if name not in drop}, directory / "model.safetensors")
    return directory


def read(path, dtype="float32"):
    source = open_source(path)
    return read_params(source, architecture_from_config(source.config), dtype)


def test_params_of_a_directory(tmp_path):
    stored = decoder_cases.tensors(decoder_cases.CASES["biases"])
    params = read(checkpoint(tmp_path, "biases"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(values.size for values in stored.values())
    layer = "model.layers.1"
    attention = params["layers"][1]["self_attn"]
    np.testing.assert_array_equal(attention["k_proj"]["kernel"], stored[f"{layer}.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(attention["k_proj"]["bias"], stored[f"{layer}.self_attn.k_proj.bias"])
    np.testing.assert_array_equal(params["embed"]["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"]["norm"]["scale"], stored["model.norm.weight"])


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_are_converted(tmp_path, stored, dtype):
    head = np.linspace(-2, 2, 96 * 48).reshape(96, 48).astype(stored)
    params = read(checkpoint(tmp_path, **{"lm_head.weight": head}), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    kernel = params["head"]["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, head.T.astype(np.float32).astype(jnp.dtype(dtype)))


def test_params_of_a_gguf_file(tmp_path):
    tensors = gguf_files.hf_tensors()
    path = gguf_files.write(tmp_path / "model.gguf", tensors, type=Type.F32)
    params = read(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(params["layers"][0]["self_attn"]["q_proj"]["kernel"], tensors[name].T)
    np.testing.assert_array_equal(params["head"]["lm_head"]["kernel"], tensors["lm_head.weight"].T)


def test_load_gives_a_model_that_runs(tmp_path):
    model = load(checkpoint(tmp_path, "tied_gqa"))
    logits = model(decoder_cases.tokens("tied_gqa"))
    assert logits.shape == (decoder_cases.BATCH, decoder_cases.TIME, 96)
    assert np.isfinite(logits).all()
    assert model.source["model_type"] == "llama"
    assert model.tokenizer is None


def test_everything_wrong_is_listed_at_once(tmp_path):
    checkpoint(
        tmp_path,
        drop=["model.layers.0.mlp.up_proj.weight"],
        **{
            "model.norm.weight": np.ones(5, np.float32),
            "model.layers.1.self_attn.q_norm.weight": np.ones(48, np.float32),
        },
    )
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: does not fit its config: ")
    assert "model.layers.0.mlp.up_proj.weight is missing" in str(error.value)
    assert "model.norm.weight has shape (5,), not (48,)" in str(error.value)
    assert "model.layers.1.self_attn.q_norm.weight belongs to no part" in str(error.value)


def test_long_lists_are_cut(tmp_path):
    checkpoint(tmp_path, config={"intermediate_size": 88, "hidden_size": 40})
    with pytest.raises(CheckpointError, match=r"; and \d+ more\.$"):
        read(tmp_path)


def test_constants_of_old_checkpoints_are_passed_over(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    read(checkpoint(tmp_path, **extra))


def test_tied_head_may_be_stored_but_not_differ(tmp_path):
    embedding = decoder_cases.tensors(decoder_cases.CASES["tied_gqa"])["model.embed_tokens.weight"]
    read(checkpoint(tmp_path, "tied_gqa", **{"lm_head.weight": embedding.copy()}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read(checkpoint(tmp_path, "tied_gqa", **{"lm_head.weight": embedding + 1}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_are_named(tmp_path, value):
    norm = np.ones(48, np.float32)
    norm[3] = value
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds NaN or infinity"):
        read(checkpoint(tmp_path, **{"model.norm.weight": norm}))


def test_float_weights_under_a_packed_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json says awq, but no module has a tensor qweight"):
        read(checkpoint(tmp_path, config={"quantization_config": {"quant_method": "awq"}}))


def test_unsupported_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype='float16' is not supported: use float32 or bfloat16"):
        load(checkpoint(tmp_path), dtype="float16")


def test_open_source_tells_formats_apart(tmp_path):
    assert isinstance(open_source(str(checkpoint(tmp_path))), SafetensorsDirectory)
    path = gguf_files.write(tmp_path / "model.GGUF", gguf_files.hf_tensors())
    assert isinstance(open_source(path), GgufFile)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give a \.gguf file, a directory"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json: give a \.gguf file"):
        open_source(tmp_path)
    gguf_files.write(tmp_path / "m.gguf", gguf_files.hf_tensors())
    with pytest.raises(CheckpointError, match=r"has no config\.json: did you mean .*m\.gguf\?"):
        open_source(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.bin: is not a checkpoint: give"):
        open_source(tmp_path / "model.bin")


def test_hub_ids_are_downloaded_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(model_id, **options):
        asked.update(options, id=model_id)
        return str(checkpoint(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert isinstance(open_source("org/model-1.5"), SafetensorsDirectory)
    assert asked["id"] == "org/model-1.5"
    assert not [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or "pt" in pattern]


def test_hub_cannot_be_reached(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(model_id, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="org/model is no local path, and the Hugging Face Hub cannot be"):
        open_source("org/model")
