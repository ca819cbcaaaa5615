import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from decoder_models import byte_tokenizer
from tiny_quantization import BATCHES, float_model

from gptq_jax import QuantSpec, StoreSink, gptq, load, quantize_blocks, save
from gptq_jax.storage import directory
from gptq_jax.storage import sink as sinks
from gptq_jax.storage.base import CheckpointError

SPEC, METHOD = QuantSpec(bits=4, group_size=24), gptq()
BLOCKS = 3


def model(seed=0):
    return replace(float_model(layers=BLOCKS, seed=seed), tokenizer=byte_tokenizer())


def run(path, *, source=None, spec=SPEC, batches=BATCHES, method=None, stop_after=None, **options):
    """Quantize into a store; with `stop_after`, as a process that is killed before it writes one block more."""
    sink = StoreSink(path, source or model(), **options)
    if stop_after is not None:
        write = sink.write

        def stops(index, *rest):
            if index == stop_after:
                raise KeyboardInterrupt
            write(index, *rest)

        sink.write = stops
    with sink:
        return quantize_blocks(source or model(), sink, batches, spec, method or METHOD, devices=1)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in peace."""
    path = tmp_path_factory.mktemp("whole") / "out"
    run(path)
    return path


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "out"
    with pytest.raises(KeyboardInterrupt):
        run(path, stop_after=2)
    return path


@pytest.fixture
def half(two_blocks, tmp_path):
    """The target of a run of which two of three blocks are stored."""
    shutil.copytree(two_blocks.parent, tmp_path / "half")
    return tmp_path / "half" / "out"


def test_a_sink_writes_what_save_writes(whole, tmp_path):
    loaded = load(whole)
    # transformers notes in a tokenizer that it was loaded.
    save(replace(loaded, tokenizer=byte_tokenizer()), tmp_path / "saved")
    streamed, saved = contents(whole), contents(tmp_path / "saved")
    manifests = [json.loads(files.pop("gptq_jax.json")) for files in (streamed, saved)]
    manifests[0]["files"].pop("run.json")
    assert json.loads(streamed.pop("run.json"))["settings"]["damping"] == 0.01
    assert streamed == saved
    for manifest in manifests:
        manifest.pop("sha256")
    assert manifests[0] == manifests[1]
    assert loaded.report["layers"][0]["path"] == "layers.0.self_attn.q_proj"
    assert os.listdir(whole.parent) == ["out"]


@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_a_resumed_run_gives_the_same_bytes(whole, tmp_path, monkeypatch, blocks):
    out, opened = tmp_path / "out", []

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sinks, "complete", stops)
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_after=blocks if blocks < BLOCKS else None)
    monkeypatch.undo()
    assert not out.exists()
    run(out, on_open=lambda *counts: opened.append(counts))
    assert opened == [(blocks, BLOCKS)]
    assert contents(out) == contents(whole)
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_quantized_twice(half, monkeypatch):
    written, write = [], StoreSink.write
    monkeypatch.setattr(StoreSink, "write", lambda self, *block: (written.append(block[0]), write(self, *block)))
    run(half)
    assert written == [BLOCKS - 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spec": QuantSpec(bits=3, group_size=24)}, "grids default bits was 4, and is 3 now"),
        ({"method": gptq(damping=0.05)}, "settings damping was 0.01, and is 0.05 now"),
        ({"batches": BATCHES[:1]}, "calibration is another"),
        ({"source": float_model(layers=BLOCKS, seed=1)}, "model weights is another"),
        ({"settings": {"seed": 3}}, "settings seed was not given, and is 3 now"),
    ],
)
def test_another_run_is_refused_by_name(half, changed, message):
    before = contents(half.parent)
    with pytest.raises(ValueError, match=rf"2 of 3 blocks of another run: {message}\. Use the same settings .*restart"):
        run(half, **changed)
    assert contents(half.parent) == before
    run(half)


def test_restart_throws_the_remains_away(half):
    run(half, batches=BATCHES[:1], restart=True)
    assert {layer["tokens"] for layer in load(half).report["layers"]} == {BATCHES[0].size}
    assert os.listdir(half.parent) == ["out"]


def test_remains_of_another_version_are_refused(half):
    file = half.parent / ".out.unfinished" / "remains.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
    with pytest.raises(ValueError, match=r"another version of gptq-jax: .* throw it away with --restart"):
        run(half)
    run(half, restart=True)


def test_damaged_remains_are_named(half):
    part = half.parent / ".out.unfinished" / "store" / "arrays" / "layers.1"
    file = max((file for file in part.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"layers\.1/.* is damaged"):
        run(half)


class Dying:
    """From the step of that number on, every step of the operating system fails: as of a process that was killed."""

    steps = ("rename", "replace", "fsync", "mkdir", "unlink")

    def __init__(self, monkeypatch, at):
        self.at, self.done, self.counts = at, 0, False
        for name in self.steps:
            monkeypatch.setattr(os, name, self.step(getattr(os, name)))

    def step(self, real):
        def take(*args, **options):
            self.done += self.counts
            if self.done >= self.at:
                raise KeyboardInterrupt
            return real(*args, **options)

        return take


@pytest.fixture(scope="module")
def all_blocks(tmp_path_factory):
    """What a run leaves that has stored all blocks, and the report that it would finish with."""
    path = tmp_path_factory.mktemp("all") / "out"
    sink, reports = StoreSink(path, model()), []

    def stops(report):
        reports.append(report)
        raise KeyboardInterrupt

    sink.finish = stops
    with sink, pytest.raises(KeyboardInterrupt):
        quantize_blocks(model(), sink, BATCHES, SPEC, METHOD, devices=1)
    return path, reports[0]


@pytest.mark.parametrize("existing", [True, False])
def test_every_step_of_the_end_can_be_the_last(whole, all_blocks, tmp_path, monkeypatch, existing):
    """Wherever it is killed after the last block, the target is old or new, and the same run again makes it new."""
    left, report = all_blocks
    run_of_it = json.loads((left.parent / ".out.unfinished" / "remains.json").read_text())["run"]
    expected, outcomes = contents(whole), []
    for at in (1, 3, 7, 20, 50, 90, 110, 120, 140, 200, 300, 10**6):
        place = tmp_path / str(at)
        shutil.copytree(left.parent, place)
        if existing:
            shutil.copytree(whole, place / "out")
            (place / "out" / "old.txt").write_text("old")
        before = contents(place / "out") if existing else None
        sink = StoreSink(place / "out", model(), overwrite=existing)
        with monkeypatch.context() as patch:
            dying = Dying(patch, at)
            sink.open(run_of_it)
            dying.counts = True
            try:
                sink.finish(report)
                outcomes.append("complete")
            except KeyboardInterrupt:
                outcomes.append("killed")
        sink._lock = sink._lock and sink._lock.close()  # as the kernel does
        found = contents(place / "out") if (place / "out").exists() else None
        assert found in (before, expected)
        if found == before:
            again = StoreSink(place / "out", model(), overwrite=existing)
            assert again.open(run_of_it) == BLOCKS
            again.finish(report)
        assert contents(place / "out") == expected
    assert set(outcomes) == {"complete", "killed"}


def test_two_at_once_are_refused(half):
    with StoreSink(half, model()) as first:
        first.open(json.loads((half.parent / ".out.unfinished" / "remains.json").read_text())["run"])
        with pytest.raises(BlockingIOError, match="is being written by another process"):
            run(half)
    run(half)


def test_too_little_room_is_told_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 70 * 2**20))
    with pytest.raises(OSError, match="has 70 MiB free, but 164 are needed"):
        StoreSink(tmp_path / "out", model(), nbytes=100 * 2**20)


def test_a_target_that_came_meanwhile_is_not_replaced(half):
    sink = StoreSink(half, model())
    save(float_model(layers=1), half)
    with sink, pytest.raises(FileExistsError, match="exists: pass --overwrite"):
        quantize_blocks(model(), sink, BATCHES, SPEC, METHOD, devices=1)
    run(half, overwrite=True)
    assert len(load(half).params["layers"]) == BLOCKS


def test_modules_of_users_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a int cannot be stored block by block"):
        StoreSink(tmp_path / "out", 3)


KILLED = """
import os, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import test_sink
write = test_sink.StoreSink.write
def kills(self, index, *rest):
    write(self, index, *rest)
    if index == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
test_sink.StoreSink.write = kills
test_sink.run(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", range(BLOCKS))
def test_killed_processes(whole, tmp_path, after):
    tests = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(after), str(tests), str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    assert os.listdir(tmp_path) == ["out"]
