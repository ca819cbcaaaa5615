import json
import os

import pytest
from export_models import packed_model
from typer.testing import CliRunner

from gptq_jax import load, save
from gptq_jax.cli import Format, app
from gptq_jax.storage.export import FORMATS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "store"
    save(packed_model(tokenizer=True)[0], path)
    return path


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


def test_every_format_is_offered():
    assert [format.value for format in Format] == list(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_export(store, tmp_path, format):
    out = tmp_path / ("m.gguf" if format == "gguf" else "out")
    result = run("export", store, "--format", format, "--out", out, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert f"wrote {out}" in result.stderr
    assert load(out).tokenizer is not None
    assert run("export", store, "--format", format, "--out", out).exit_code == 2
    assert run("export", store, "--format", format, "--out", out, "--overwrite").exit_code == 0


def test_shards_and_evaluations(store, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"text": "held-out.txt", "length": 16, "perplexity": 9.5}))
    options = ("--max-shard-size", "30KB", "--evaluation", tmp_path / "eval.json")
    result = run("export", store, "--format", "gptq", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "out")
    assert "| held-out.txt | 16 |  | 9.5000 |" in (tmp_path / "out/README.md").read_text()


def test_remarks_are_told(tmp_path):
    from gptq_jax import QuantSpec

    save(packed_model(QuantSpec(bits=3, group_size=32))[0], tmp_path / "store")
    result = run("export", tmp_path / "store", "--format", "gguf", "--out", tmp_path / "m.gguf")
    assert "codes of 3 bits take 4 bits each." in result.stderr
    assert "there is no tokenizer, without which llama.cpp loads nothing." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--format", "gguf", "--out", "OUT"), "does not end in .gguf"),
        (("--format", "gptq", "--out", "OUT", "--max-shard-size", "much"), "'much' is no size"),
        (("--format", "gptq", "--out", "OUT/nowhere/x"), "nowhere does not exist"),
    ],
)
def test_bad_options_are_told_before_anything_is_loaded(tmp_path, arguments, error):
    result = run("export", tmp_path / "no-model", *(text.replace("OUT", str(tmp_path / "o")) for text in arguments))
    assert result.exit_code == 2
    assert error in result.stderr
    assert "no-model" not in result.stderr
