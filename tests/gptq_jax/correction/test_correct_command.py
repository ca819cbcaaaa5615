"""`gptq-jax correct`, and the adapters it writes in `eval` and `generate`."""

import json

import decoder_cases
import numpy as np
import pytest
from decoder_models import TEXT, write_directory
from tiny_quantization import rounded
from typer.testing import CliRunner

import gptq_jax
from gptq_jax.cli import app
from gptq_jax.rewrites import hadamard
from gptq_jax.storage.progress import Progress

CONFIG = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 1}
QUICK = ("--samples", "4", "--length", "24", "--batch-size", "2")


def run(*arguments, codes=(0, 2)):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])
    assert result.exit_code in codes, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and the model at 2 bits, as directories."""
    path = tmp_path_factory.mktemp("correct")
    write_directory(path / "model", CONFIG)
    (path / "text.txt").write_text(TEXT * 3)
    model = gptq_jax.load(path / "model")
    gptq_jax.save(rounded(model, gptq_jax.QuantSpec(bits=2, group_size=24)), path / "packed")
    return path


def test_corrects_what_eval_and_generate_run(folder, tmp_path):
    text = ("--text", folder / "text.txt", "--length", 32)
    out = tmp_path / "adapter"
    done = run(
        *("correct", folder / "model", folder / "packed", "--out", out, "--calibration", folder / "text.txt", *QUICK),
        *("--rank", 8, "--json"),
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)  # so nothing else is there
    assert f"bits per weight: {told['bits_per_weight']:.3f}, with the factors" in done.stderr
    assert told["corrected_bits_per_weight"] > told["bits_per_weight"]
    assert len(told["layers"]) == 7

    model, packed = gptq_jax.load(folder / "model"), gptq_jax.load(folder / "packed")
    batches = gptq_jax.calibration_batches(
        str(folder / "text.txt"), model.tokenizer, samples=4, length=24, batch_size=2
    )
    expected = gptq_jax.eora(model, packed, batches, 8)
    adapters = gptq_jax.load_lora(out, packed)
    assert adapters.keys() == expected.keys()
    for path, added in adapters.items():
        np.testing.assert_array_equal(added.a, expected[path].a)

    def perplexity(*options):
        result = run("eval", folder / "packed", *text, "--against", folder / "model", *options, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    plain, corrected = perplexity(), perplexity("--adapter", out)
    assert corrected["kl_divergence"] < 0.6 * plain["kl_divergence"]
    assert (corrected["adapter"], "adapter" in plain) == (str(out), False)

    generate = ("generate", folder / "packed", "--prompt", "the quick", "--max-new-tokens", 8)
    generated = run(*generate, "--adapter", out)
    of_python = gptq_jax.generate(gptq_jax.with_lora(gptq_jax.prepare(packed), adapters), "the quick", max_new_tokens=8)
    assert generated.stdout == f"{of_python}\n"

    again = ("correct", folder / "model", folder / "packed", "--out", out, "--calibration", folder / "text.txt")
    assert "exists: pass --overwrite" in run(*again).stderr


def test_a_model_that_was_rotated_before(folder, tmp_path):
    """The command rotates the float model alike, as the report of the packed one tells."""
    model = gptq_jax.load(folder / "model")
    tokens = [np.random.default_rng(0).integers(0, 300, (2, 24), dtype=np.int32)]
    rewrite = hadamard(3, values=True)
    grid = gptq_jax.QuantSpec(bits=2, group_size=24)
    packed, _ = gptq_jax.quantize(model, tokens, grid, gptq_jax.rtn()._replace(rewrite=rewrite))
    gptq_jax.save(packed, tmp_path / "packed")
    start = ("correct", folder / "model", tmp_path / "packed", "--out", tmp_path / "out")
    done = run(*start, "--calibration", folder / "text.txt", *QUICK, "--targets", "o_proj", "--json")
    assert done.exit_code == 0, done.stderr
    (layer,) = json.loads(done.stdout)["layers"]
    assert layer["corrected_error"] < 0.8 * layer["error"] < 0.8


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch):
    """Stopped where it wrote adapters: no block is solved again, and the files are those of a run in peace."""
    monkeypatch.setattr("gptq_jax.storage.progress.EVERY", 0.0)
    text = ("--calibration", folder / "text.txt", *QUICK, "--rank", 4)

    def start(out, *options, **codes):
        return run("correct", folder / "model", folder / "packed", "--out", tmp_path / out, *text, *options, **codes)

    assert start("peace").exit_code == 0
    keep = Progress.keep

    def stop(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(Progress, "keep", stop)
        stopped = start("out", codes=(130,))
    assert "interrupted: 1 blocks are kept; the same command goes on" in stopped.stderr
    assert not (tmp_path / "out").exists()
    assert "settings.rank was 4, is 5" in " ".join(start("out", "--rank", 5).stderr.split())
    done = start("out")
    assert done.exit_code == 0, done.stderr
    assert "going on with what an interrupted run left: 1 blocks are done" in done.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "peace" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "peace"]  # nothing is left beside them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 100), "rank=100 is more than the 48 that layers.0.self_attn.q_proj can have"),
        (("--targets", "nothing"), "targets='nothing' matches no packed layer"),
        (("--length", 129), "--length 129 is more than the model's context of 128"),
        (("--calibration", "absent.txt"), "absent.txt does not exist"),
    ],
)
def test_errors(folder, tmp_path, options, message):
    start = ("correct", folder / "model", folder / "packed", "--out", tmp_path / "out")
    result = run(*start, "--calibration", folder / "text.txt", *QUICK, *options)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_none(folder):
    result = run("generate", folder / "packed", "--prompt", "x", "--adapter", folder / "model")
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr
