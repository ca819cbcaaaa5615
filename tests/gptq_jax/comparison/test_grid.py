"""Grids of runs: what is measured, that they are gone on with, what is refused, what fails."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from own_methods import clip_search
from tiny_quantization import float_model

from gptq_jax import QuantSpec, compare_methods, end_to_end_tuning, gptq, low_rank_correction, perplexity, quantize, rtn
from gptq_jax.calibration import batches, sample_windows
from gptq_jax.comparison import grid
from gptq_jax.comparison.measuring import measured
from gptq_jax.evaluate import compare

MODEL = float_model(layers=1)
RANDOM = np.random.default_rng(3)
FIT, HELD_OUT = RANDOM.integers(0, 96, 400), RANDOM.integers(0, 96, 130)
W4, W3 = (QuantSpec(bits=bits, group_size=24) for bits in (4, 3))
DRAWS = {"samples": 4, "length": 24, "batch_size": 2, "eval_length": 20, "eval_batch_size": 3}


def run(methods=None, specs=(W4,), **options):
    methods = {"rtn": rtn()} if methods is None else methods
    return compare_methods(MODEL, methods, specs, FIT, HELD_OUT, **{**DRAWS, **options})


@pytest.fixture(scope="module")
def whole():
    """Two methods on two seeds."""
    return run({"rtn": rtn(), "mine": clip_search()}, seeds=(0, 5))


def test_figures_are_those_of_doing_it_by_hand(whole):
    stream = FIT.astype(np.int32)
    for result in whole.cells[:3]:  # both methods, both seeds
        windows = sample_windows(stream, samples=4, length=24, seed=result.cell.seed)
        method = rtn() if result.cell.method == "rtn" else clip_search()
        packed, report = quantize(MODEL, batches(windows, 2), result.cell.spec, method)
        expected = compare(packed, MODEL, HELD_OUT, length=20, batch_size=3)
        figures = result.figures
        assert figures.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert figures.kl == pytest.approx(expected.kl, rel=1e-3)
        assert figures.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.02)
        assert figures.bits_per_weight == report.bits_per_weight
        assert figures.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(packed.params))
        assert [layer.path for layer in figures.layers] == [layer.path for layer in report.layers]
        found = [layer.relative_error for layer in figures.layers]
        assert found == pytest.approx([layer.relative_error for layer in report.layers], rel=1e-3)
    assert whole.float_figures.perplexity == pytest.approx(perplexity(MODEL, HELD_OUT, length=20), rel=1e-5)


def test_every_cell_is_there_and_in_order(whole):
    found = [(result.cell.method, result.cell.seed) for result in whole.cells]
    assert found == [("rtn", 0), ("rtn", 5), ("mine", 0), ("mine", 5)]
    assert whole.failures == ()
    assert all(result.figures.seconds > 0 and result.figures.evaluation_seconds > 0 for result in whole.cells)


def test_the_end_of_a_method_is_measured_too():
    """Factors cost bits, other scales do not; on a text of one token both have something to gain."""
    methods = {
        "rtn": rtn(),
        "eora": rtn()._replace(finish=low_rank_correction(4)),
        "distill": rtn()._replace(finish=end_to_end_tuning(epochs=4, rate=1e-2)),
    }
    text = np.full(130, 7)
    found = compare_methods(MODEL, methods, [QuantSpec(bits=2, group_size=24)], text, text, **DRAWS)
    rows = {row.method: {name: spread.mean for name, spread in row.values.items()} for row in found.rows()}
    assert rows["eora"]["kl"] < 0.5 * rows["rtn"]["kl"]
    assert rows["distill"]["kl"] < 0.5 * rows["rtn"]["kl"]
    assert rows["distill"]["bits_per_weight"] == rows["rtn"]["bits_per_weight"]
    factors = 16 * 4 * sum(d_in + d_out for d_in, d_out in _layers())
    expected = rows["rtn"]["bits_per_weight"] + factors / sum(d_in * d_out for d_in, d_out in _layers())
    assert rows["eora"]["bits_per_weight"] == pytest.approx(expected, abs=1e-3)
    assert rows["eora"]["bytes"] > rows["rtn"]["bytes"]


def _layers():
    return [(48, 48), (48, 24), (48, 24), (48, 48), (48, 80), (48, 80), (80, 48)]


def test_a_grid_is_gone_on_with(tmp_path, monkeypatch):
    done = []
    run_cell = grid._run

    def counted(cell, *rest):
        done.append((cell.method, cell.spec.bits, cell.seed))
        return run_cell(cell, *rest)

    monkeypatch.setattr(grid, "_run", counted)
    out = tmp_path / "out"
    first = run(out=out)
    assert done == [("rtn", 4, 0)]
    assert run(out=out).to_json() == first.to_json()  # the seconds too: nothing was run
    assert len(done) == 1
    # More methods, grids and seeds: what is there stays.
    methods = {"rtn": rtn(), "mse": rtn("mse")}
    wider = run(methods, (W4, W3), seeds=(0, 1), out=out)
    assert len(done) == len(set(done)) == 8 == len(wider.cells)
    assert first.cells[0] in wider.cells
    # The narrow command again tells of all that is there.
    assert {result.cell for result in run(out=out).cells} == {result.cell for result in wider.cells}
    # A cell whose file is gone is run anew, the others are not.
    next(iter((out / "cells").glob("mse-W3*s1*"))).unlink()
    run(methods, (W4, W3), seeds=(0, 1), out=out)
    assert done[8:] == [("mse", 3, 1)]


def test_other_settings_are_refused_by_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = {"m": gptq(damping=0.01)}
    monkeypatch.setattr(grid, "quantize", lambda model, batches, spec, method: quantize(model, batches, spec, rtn()))
    run(first, out=out)
    with pytest.raises(ValueError, match=r"other settings: eval_batch_size is 3 there, 1 here; samples is 4 there, 5"):
        run(first, out=out, samples=5, eval_batch_size=1)
    with pytest.raises(ValueError, match=r"held_out_tokens is [0-9a-f]{12}\.\.\. there"):
        compare_methods(MODEL, first, (W4,), FIT, HELD_OUT[::-1], out=out, **DRAWS)
    with pytest.raises(ValueError, match=r"model\.weights is"):
        compare_methods(float_model(layers=1, seed=1), first, (W4,), FIT, HELD_OUT, out=out, **DRAWS)
    with pytest.raises(ValueError, match=r"a method 'm' that has settings .*'damping': 0.01.* there, .*0.5.* here"):
        run({"m": gptq(damping=0.5)}, out=out)
    with pytest.raises(ValueError, match="a method 'm' that has name gptq there, custom here"):
        run({"m": clip_search()}, out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match="holds no comparison"):
        run(out=tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(out=tmp_path / "nowhere" / "out")


def test_other_code_of_a_users_method_is_noticed(tmp_path, monkeypatch):
    run({"clip": clip_search()}, out=tmp_path / "out")
    monkeypatch.setattr(grid, "digest", lambda file: "changed")
    with pytest.raises(ValueError, match="a method 'clip' that has other code"):
        run({"clip": clip_search()}, out=tmp_path / "out")


def test_damaged_files_are_named(tmp_path):
    run(out=tmp_path / "out")
    (file,) = (tmp_path / "out" / "cells").iterdir()
    whole = file.read_text()
    for damage, message in ((whole[:50], "is damaged"), ("[]", "holds list"), ("{}", "is no result of this version")):
        file.write_text(damage)
        with pytest.raises(ValueError, match=rf"{file.name} {message}"):
            run(out=tmp_path / "out")


def broken():
    """A method that fails while it solves."""

    def solve(weight, stats, spec):
        raise RuntimeError(f"no idea\nwhat to do with {spec.bits} bits")

    return rtn()._replace(solve=solve, name="broken")


def test_a_cell_that_fails_leaves_the_others_alone(tmp_path):
    methods = {"broken": broken(), "rtn": rtn()}
    found = run(methods, seeds=(0, 1), out=tmp_path / "out")
    assert [result.cell.method for result in found.failures] == ["broken", "broken"]
    assert found.failures[0].failed.startswith("ValueError: method 'broken': solve, of a weight")
    assert found.failures[0].failed.endswith("RuntimeError: no idea what to do with 4 bits")
    assert [row.seeds for row in found.rows()] == [(), (0, 1)]
    # It is tried again, and may be another method then: nothing was measured by the first.
    mended = run({**methods, "broken": clip_search()}, seeds=(0, 1), out=tmp_path / "out")
    assert mended.failures == ()
    assert len(mended.cells) == 4


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({}, {}, "methods is empty"),
        ([rtn(), rtn()], {}, "two are called 'rtn'"),
        (None, {"specs": ()}, "must be at least one"),
        (None, {"specs": (W4, W4)}, "none twice"),
        (None, {"seeds": (0, 0)}, r"seeds=\[0, 0\] must be different"),
        (None, {"seeds": ()}, "at least one"),
        (None, {"seeds": (-1,)}, "none negative"),
        (None, {"length": 129}, "length=129 must be .* at most the model's context of 128"),
        (None, {"eval_length": 1}, "eval_length=1 must be at least 2"),
        (None, {"eval_windows": 0}, "eval_windows=0 must be at least 1"),
        (None, {"samples": 0}, "samples=0 must be positive"),
        (None, {"eval_length": 128, "length": 128, "held_out": HELD_OUT[:100]}, "held_out has 100 tokens, less"),
        (None, {"held_out": HELD_OUT[None]}, r"held_out has shape \(1, 130\)"),
        (None, {"calibration": "a text"}, "no tokenizer"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_run(tmp_path, monkeypatch, methods, options, message):
    monkeypatch.setattr(grid, "quantize", lambda *_: pytest.fail("a cell was run"))
    options = {"calibration": FIT, "held_out": HELD_OUT, "specs": (W4,), **DRAWS, **options}
    with pytest.raises(ValueError, match=message):
        compare_methods(MODEL, {"rtn": rtn()} if methods is None else methods, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused():
    packed, _ = quantize(MODEL, [FIT[None, :48].reshape(2, 24).astype(np.int32)], W4, rtn())
    with pytest.raises(ValueError, match="quantized already"):
        compare_methods(packed, [rtn()], [W4], FIT, HELD_OUT, **DRAWS)


def test_peak_memory_is_that_of_the_block():
    def fill(megabytes):
        return np.ones(megabytes * 2**20, np.uint8).sum()

    with measured() as much:
        fill(300)
    with measured() as little:
        fill(1)
    if much.peak_bytes is None:
        pytest.skip("this kernel does not count anew")
    assert much.peak_bytes - little.peak_bytes > 250 * 2**20


def test_compilation_is_told_apart():
    x = np.ones(7, np.float32)
    function = jax.jit(lambda x: jax.numpy.tanh(x) * 3.0)
    with measured() as first:
        function(x).block_until_ready()
    with measured() as second:
        function(x).block_until_ready()
    assert 0 < first.compile_seconds <= first.seconds
    assert second.compile_seconds == 0


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}]
from gptq_jax.comparison import grid
import test_grid
run_cell, count = grid._run, [0]
def counted(cell, *rest):
    if count[0] == 2:
        os.kill(os.getpid(), {signal})
    count[0] += 1
    return run_cell(cell, *rest)
grid._run = counted
test_grid.run({{"rtn": test_grid.rtn()}}, (test_grid.W4,), seeds=(0, 1, 2), out={out!r})
"""


@pytest.mark.slow
def test_a_killed_grid_goes_on(tmp_path):
    here = os.path.dirname(__file__)
    code = KILLED.format(tests=here, signal=int(signal.SIGKILL), out=str(tmp_path / "out"))
    path = os.pathsep.join([os.path.join(here, "..", ".."), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = {file.name: file.read_text() for file in (tmp_path / "out" / "cells").iterdir()}
    assert len(before) == 2
    assert all(json.loads(text)["figures"] for text in before.values())
    found = run(seeds=(0, 1, 2), out=tmp_path / "out")
    assert len(found.cells) == 3
    assert all((tmp_path / "out" / "cells" / name).read_text() == text for name, text in before.items())


def test_names_of_files_are_safe_and_different():
    odd = grid.Cell("../my module:f|x" * 20, W4, 0)
    assert "/" not in odd.stem
    assert len(odd.stem) < 100
    assert odd.stem != replace(odd, seed=1).stem != replace(odd, method=odd.method + "y").stem
