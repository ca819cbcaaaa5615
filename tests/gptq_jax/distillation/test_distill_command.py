"""`gptq-jax distill`, and what is said where a whole model is wanted."""

import json

import decoder_cases
import pytest
from decoder_models import TEXT, write_directory
from tiny_quantization import rounded
from typer.testing import CliRunner

import gptq_jax
from gptq_jax.cli import app
from gptq_jax.distillation import end_to_end

CONFIG = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 1}
QUICK = ("--samples", "24", "--length", "24", "--rate", "0.01")


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])
    return result, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and the model at 2 bits, as directories."""
    path = tmp_path_factory.mktemp("distill")
    write_directory(path / "model", CONFIG)
    (path / "text.txt").write_text(TEXT * 3)
    model = gptq_jax.load(path / "model")
    gptq_jax.save(rounded(model, gptq_jax.QuantSpec(bits=2, group_size=24)), path / "packed")
    return path


def command(folder, out, *options):
    return (
        "distill",
        folder / "model",
        folder / "packed",
        "--out",
        out,
        "--calibration",
        folder / "text.txt",
        *options,
    )


def test_stored_and_nearer_to_the_float_model(folder, tmp_path):
    out = tmp_path / "out"
    result, said = run(*command(folder, out, *QUICK, "--json"))
    assert result.exit_code == 0, said
    told = json.loads(result.stdout)  # so nothing else is there
    assert told["after"] < 0.8 * told["before"]
    assert f"on windows held back: {told['before']:.4f}, now {told['after']:.4f}" in said
    model, packed, trained = (gptq_jax.load(path) for path in (folder / "model", folder / "packed", out))
    text = (folder / "text.txt").read_text()
    before, after = (gptq_jax.compare(each, model, text, length=24).kl for each in (packed, trained))
    assert after < 0.8 * before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing is left beside it
    again, said = run(*command(folder, out, *QUICK))
    assert (again.exit_code, "exists: pass --overwrite" in said) == (2, True)


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch):
    run(*command(folder, tmp_path / "peace", *QUICK))
    monkeypatch.setattr("gptq_jax.storage.progress.EVERY", 0.0)
    step, count = end_to_end.Student.step, 0

    def stops(*arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(end_to_end.Student, "step", stops)
    result, said = run(*command(folder, tmp_path / "out", *QUICK))
    assert result.exit_code == 130
    assert "interrupted: 4 steps are kept; the same command goes on" in said
    assert not (tmp_path / "out").exists()
    result, said = run(*command(folder, tmp_path / "out", *QUICK, "--epochs", 2))
    assert (result.exit_code, "settings.epochs was 1, is 2" in said) == (2, True)
    result, said = run(*command(folder, tmp_path / "out", *QUICK))
    assert result.exit_code == 0, said
    assert "going on with what an interrupted run left: 4 steps are done" in said
    for one, other in zip(*(sorted((tmp_path / name).rglob("*")) for name in ("peace", "out")), strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "0"), r"rate=0.0 must be positive"),
        (("--length", 129), "--length 129 is more than the model's context of 128"),
        (("--calibration", "absent.txt"), "absent.txt does not exist"),
        (("--samples", 1), "1 windows: pass at least two"),
    ],
)
def test_errors(folder, tmp_path, options, message):
    result, said = run(*command(folder, tmp_path / "out", *QUICK, *options))
    assert message in said
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("end", "command"), [("distill", "distill"), ("eora", "correct")])
def test_quantize_says_which_command_comes_after(folder, tmp_path, end, command):
    result, said = run("quantize", folder / "model", "--out", tmp_path / "out", "--method", f"{end}+qep")
    assert result.exit_code == 2
    assert f"{end} is done to a whole model: quantize without it, and then run `gptq-jax {command} MODEL" in said
    assert list(tmp_path.iterdir()) == []
