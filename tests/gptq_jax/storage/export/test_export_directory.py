"""What every export to a directory does: shards, config, tokenizer, replacing."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import TEXT
from export_models import CONFIG, TOKENS, packed_model
from safetensors import safe_open

from gptq_jax.storage import CheckpointError, directory, load, save
from gptq_jax.storage.export import FORMATS, base, export
from gptq_jax.storage.export.base import parse_size, read_evaluations

DIRECTORIES = [name for name in FORMATS if name != "gguf"]


@pytest.fixture(scope="module")
def model():
    return packed_model(tokenizer=True)[0]


def tensors(path):
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("format", DIRECTORIES)
def test_a_directory_as_others_load_it(tmp_path, model, format):
    export(model, tmp_path / "out", format=format)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert ("quantization_config" in config) == (format != "float")
    stored = tensors(tmp_path / "out/model.safetensors")
    floats = {name for name in stored if name.endswith((".weight", ".bias"))}
    assert {stored[name].dtype for name in floats} == {np.dtype(np.float16)}
    assert floats >= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "out").iterdir())
    read = load(tmp_path / "out")
    assert read.tokenizer(TEXT)["input_ids"] == model.tokenizer(TEXT)["input_ids"]
    assert read.tokenizer.chat_template == model.tokenizer.chat_template
    # The embedding and norms are rounded to float16.
    np.testing.assert_allclose(read(TOKENS), model(TOKENS), rtol=0, atol=4e-3)


@pytest.mark.parametrize("format", DIRECTORIES)
def test_shards(tmp_path, model, format):
    limit = 30_000
    export(model, tmp_path / "whole", format=format)
    export(model, tmp_path / "cut", format=format, max_shard_size=limit)
    whole = tensors(tmp_path / "whole/model.safetensors")
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "cut").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) >= 3
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in files:
        found = tensors(tmp_path / "cut" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(found)
        assert len(found) == 1 or sum(values.nbytes for values in found.values()) <= limit
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name])
    assert "model.safetensors" not in os.listdir(tmp_path / "cut")
    for one, other in zip(
        jax.tree.leaves(load(tmp_path / "cut").params), jax.tree.leaves(load(tmp_path / "whole").params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("params", "source", "expected"),
    [
        ("float32", {}, "float16"),
        ("bfloat16", {}, "bfloat16"),
        ("float32", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("float32", {"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16"),
        ("float32", {"torch_dtype": "float32"}, "float16"),
    ],
)
def test_dtype_of_what_stays_float(tmp_path, model, params, source, expected):
    floats = jax.tree.map(
        lambda leaf: leaf.astype(params) if leaf.dtype == jnp.float32 else leaf, model.params
    )  # scales are float16
    export(replace(model, params=floats, source={**CONFIG, **source}), tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == expected
    assert "dtype" not in config
    stored = tensors(tmp_path / "out/model.safetensors")
    assert stored["model.norm.weight"].dtype == jnp.dtype(expected)
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == np.float16


def test_values_beyond_a_dtype_are_refused(tmp_path, model):
    large = {**model.params, "embed": {"embedding": model.params["embed"]["embedding"].at[0, 0].set(1e5)}}
    with pytest.raises(ValueError, match=r"embed_tokens.weight reaches 1e\+05, beyond float16: export in bfloat16"):
        export(replace(model, params=large), tmp_path / "out", format="gptq")
    assert os.listdir(tmp_path) == []
    export(replace(model, params=large), tmp_path / "out", format="gptq", dtype="bfloat16")


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_rotates_inputs_as_it_runs_is_refused(tmp_path, model, format):
    rotated = replace(model, config=replace(model.config, rotated_down=True))
    with pytest.raises(
        ValueError, match=f"format='{format}' cannot hold the model, because it rotates inputs .* save it"
    ):
        export(rotated, tmp_path / "out.gguf", format=format)
    assert os.listdir(tmp_path) == []


def test_no_tokenizer(tmp_path, model):
    export(replace(model, tokenizer=None), tmp_path / "out", format="gptq")
    assert load(tmp_path / "out").tokenizer is None


def test_what_cannot_be_asked_for(tmp_path, model):
    with pytest.raises(ValueError, match="format='awq' is none of gptq, gptq_v2, compressed-tensors, float, gguf"):
        export(model, tmp_path / "out", format="awq")
    with pytest.raises(ValueError, match="dtype='int8' is not supported: use float16, bfloat16, float32"):
        export(model, tmp_path / "out", format="gptq", dtype="int8")
    for size in ("5 apples", "0", "-3", "", "GB", 0):
        with pytest.raises(ValueError, match="is no size: give one like 5GB or 500MB"):
            export(model, tmp_path / "out", format="gptq", max_shard_size=size)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2kib", 2048), ("3GiB", 3 * 2**30), ("700", 700), (12, 12)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_exports_replace_only_what_this_library_wrote(tmp_path, model):
    out = tmp_path / "out"
    export(model, out, format="gptq")
    with pytest.raises(FileExistsError, match="exists: pass --overwrite"):
        export(model, out, format="float")
    export(model, out, format="float", overwrite=True)
    assert "quantize_config.json" not in os.listdir(out)
    save(model, out, overwrite=True)
    assert "model.safetensors" not in os.listdir(out)
    export(model, out, format="gptq", overwrite=True)
    (out / "gptq_jax_export.json").unlink()
    with pytest.raises(FileExistsError, match="was not written by gptq-jax"):
        export(model, out, format="gptq", overwrite=True)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        export(model, tmp_path / "nowhere/out", format="gptq")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [(base, "write_shards"), (base, "card"), (directory, "sync")])
@pytest.mark.parametrize("existing", [True, False])
def test_an_export_cut_short_leaves_everything_as_it_was(tmp_path, model, monkeypatch, at, error, existing):
    export(model, tmp_path / "old", format="gptq")
    before = contents(tmp_path / "old")

    def fails(*_):
        raise error

    monkeypatch.setattr(*at, fails)
    with pytest.raises(type(error)):
        export(model, tmp_path / ("old" if existing else "new"), format="float", overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["old"]
    assert contents(tmp_path / "old") == before


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, model, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(2**40, 2**40, 2**26 + 50_000))
    with pytest.raises(OSError, match="64 MiB free, but 64 are needed"):
        export(model, tmp_path / "out", format="float")
    assert os.listdir(tmp_path) == []


def test_evaluations_are_read(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"model": "m", "text": "wikitext2", "length": 512, "perplexity": 12.5}))
    assert read_evaluations([path])[0]["perplexity"] == 12.5
    path.write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is not JSON"):
        read_evaluations([path])
    path.write_text('{"perplexity": "low"}')
    with pytest.raises(ValueError, match="holds no perplexity: give what `gptq-jax eval --json` prints"):
        read_evaluations([path])


def test_an_export_is_checked_as_any_checkpoint(tmp_path, model):
    export(model, tmp_path / "out", format="gptq", max_shard_size=30_000)
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="names shard 'model-00002"):
        load(tmp_path / "out")
