"""Text that the model writes itself: by a forward pass without a cache, what is likeliest and what is drawn."""

import copy
import importlib
import json
from dataclasses import replace

import decoder_cases
import numpy as np
import pytest
from decoder_models import TEXT, build, byte_tokenizer, write_directory
from tiny_quantization import float_model
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import gptq_jax
from gptq_jax import QuantSpec, rtn, self_windows
from gptq_jax.calibration import batches
from gptq_jax.cli import app
from gptq_jax.comparison.inputs import cut_inputs
from gptq_jax.self_calibration import LIKELIEST
from gptq_jax.storage.sink import StoreSink

CONFIG = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 2}
QUICK = ("--group-size", "24", "--samples", "4", "--length", "24", "--batch-size", "2", "--method", "rtn")


@pytest.fixture(scope="module")
def model():
    """Less sure of what comes next than random weights are, so that drawn tokens are not the likeliest."""
    found = float_model()
    scale = found.params["head"]["norm"]["scale"]
    return replace(found, params={**found.params, "head": {"norm": {"scale": 0.1 * scale}}})


@pytest.fixture(scope="module")
def windows(model):
    return self_windows(model, samples=12, length=64, seed=3, batch_size=12)


def log_probabilities(model, windows, temperature=1.0):
    """Of what follows each token, in float64, from whole windows at once."""
    logits = np.float64(model(windows)[:, :-1]) / temperature
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def surprise(model, windows, temperature=1.0):
    """Standard errors by which drawn tokens are less likely than the model's entropy has it."""
    drawn = windows[:, 1 + LIKELIEST :]
    log_p = log_probabilities(model, windows, temperature)[:, LIKELIEST:]
    p = np.exp(log_p)
    found = -np.take_along_axis(log_p, drawn[..., None], axis=-1)[..., 0]
    entropy = -(p * log_p).sum(-1)
    variance = (p * log_p**2).sum(-1) - entropy**2
    return (found - entropy).sum() / np.sqrt(variance.sum())


def test_drawn_tokens_are_as_likely_as_the_entropy_says(model, windows):
    assert (windows.shape, windows.dtype) == ((12, 64), np.int32)
    assert abs(surprise(model, windows)) < 4
    assert abs(surprise(model, windows, temperature=0.7)) > 6  # so that the test would see another distribution
    cold = self_windows(model, samples=12, length=64, seed=3, batch_size=12, temperature=0.7)
    assert abs(surprise(model, cold, temperature=0.7)) < 4
    assert abs(surprise(model, cold)) > 6


def test_the_first_tokens_are_drawn_and_the_next_the_likeliest(model, windows):
    best = log_probabilities(model, windows).argmax(-1)
    np.testing.assert_array_equal(windows[:, 1 : 1 + LIKELIEST], best[:, :LIKELIEST])
    assert (windows[:, 1 + LIKELIEST :] == best[:, LIKELIEST:]).mean() < 0.5
    first = self_windows(model, samples=4000, length=2, seed=0, batch_size=4000)[:, 0]
    counts = np.bincount(first, minlength=96)
    assert np.square(counts - 4000 / 96).sum() / (4000 / 96) < 95 + 5 * np.sqrt(2 * 95)  # chi-squared


def test_the_same_for_the_same_seed_however_many_at_a_time(model, windows):
    told = []
    again = self_windows(model, samples=5, length=64, seed=3, batch_size=2, on_token=lambda *each: told.append(each))
    np.testing.assert_array_equal(again, windows[:5])
    assert told == [(first * 64 + at * min(2, 5 - first), 320) for first in (0, 2, 4) for at in range(0, 64, 16)]
    other = self_windows(model, samples=12, length=64, seed=4, batch_size=12)
    assert (other == windows).mean() < 0.1
    assert len({row.tobytes() for row in windows}) == 12


def test_begins_as_the_tokenizer_begins_texts():
    """With its own first token where it puts one before texts; special tokens are not drawn."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    model = replace(build(CONFIG), tokenizer=tokenizer)
    how = {"samples": 400, "length": 3, "batch_size": 400}
    special = tokenizer.all_special_ids
    assert special
    assert not np.isin(self_windows(model, **how)[:, 0], special).any()
    tokenizer.bos_token = "<end>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    begun = self_windows(model, **how)
    assert (begun[:, 0] == tokenizer.bos_token_id).all()
    assert not np.isin(begun[:, 1], special).any()
    assert np.unique(begun[:, 1]).size > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 129}, "length=129 must be more than 1 and at most the model's context of 128"),
        ({"length": 1}, "length=1 must be more than 1"),
        ({"samples": 0}, "samples=0 must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be a positive number"),
        ({"temperature": float("nan")}, "temperature=nan must be a positive number"),
    ],
)
def test_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        self_windows(model, **{"samples": 2, "length": 8, **arguments})


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a text."""
    path = tmp_path_factory.mktemp("self")
    write_directory(path / "model", CONFIG)
    (path / "text.txt").write_text(TEXT)
    return path


def test_quantize_on_it_and_go_on_with_it(folder, tmp_path, monkeypatch):
    """A run that goes on reads what was written, as its digest in the run's description must be the same."""
    command = ("quantize", folder / "model", "--out", tmp_path / "out", "--calibration", "self", *QUICK, "--seed", 5)
    write, begun = StoreSink.write, []

    def stopped(self, index, *rest):
        if index:
            raise KeyboardInterrupt
        begun.append(write(self, index, *rest))

    monkeypatch.setattr(StoreSink, "write", stopped)
    result = run(*command)
    assert result.exit_code == 130, result.stderr
    monkeypatch.setattr(StoreSink, "write", write)
    (kept,) = map(np.load, (tmp_path / ".out.unfinished").glob("windows-*.npy"))
    writing = importlib.import_module("gptq_jax.self_calibration")
    monkeypatch.setattr(writing, "self_windows", lambda *_, **__: pytest.fail("the windows were written again"))
    result = run(*command, "--json")
    assert result.exit_code == 0, result.stderr
    assert "going on with what an interrupted run left: 1 of 2 blocks" in result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["calibration"] == "self"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    model = gptq_jax.load(folder / "model")
    windows = self_windows(model, samples=4, length=24, seed=5, batch_size=2)
    np.testing.assert_array_equal(kept, windows)
    _, expected = gptq_jax.quantize(model, batches(windows, 2), QuantSpec(group_size=24), rtn())
    assert [layer["loss"] for layer in report["layers"]] == pytest.approx([each.loss for each in expected.layers])


def test_a_window_too_long_is_told_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    loading = importlib.import_module("gptq_jax.storage.load")
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    command = ("quantize", folder / "model", "--out", tmp_path / "out", "--calibration", "self")
    result = run(*command, "--length", 200)
    assert result.exit_code == 2
    assert "--length 200 is more than the model's context of 128" in result.stderr
    result = run(*command, "--coordinator", "localhost:1")
    assert "--calibration self is for one process" in result.stderr


def test_a_comparison_has_each_seed_write_its_own(folder):
    model = gptq_jax.load(folder / "model")
    how = {"samples": 3, "length": 24, "batch_size": 2}
    cut = cut_inputs(model, "self", TEXT, seeds=(0, 1), eval_length=None, eval_windows=1, **how)
    assert cut.settings["calibration_tokens"] == "self"
    for seed, found in cut.calibration.items():
        np.testing.assert_array_equal(np.concatenate(found), self_windows(model, seed=seed, **how))
        assert [len(each) for each in found] == [2, 1]
