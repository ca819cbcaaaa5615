"""Several processes on this machine, two CPU devices each, joined as hosts are."""

import filecmp
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import decoder_cases
import jax
import numpy as np
import pytest
from decoder_models import TEXT, write_directory

from gptq_jax.parallel import hosts
from gptq_jax.storage import load

HERE = Path(__file__).resolve().parents[1]
GRID = ["--bits", "4", "--group-size", "16", "--grid", "minmax"]
CALIBRATION = ["--samples", "12", "--length", "24", "--batch-size", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 0, None), r"--process-id \(process_id\) is given without --coordinator"),
        (("auto", None, 2), r"--processes \(processes\) is given, but --coordinator auto finds it out"),
        (("localhost", 0, 2), "'localhost' is no HOST:PORT: give one like"),
        (("localhost:1234", 0, None), r"--processes \(processes\) is missing"),
        (("localhost:1234", 2, 2), "--process-id 2 is not one of 0 to 1, of --processes 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_joined(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(*arguments)


def test_one_process_is_the_first_and_waits_for_none():
    assert hosts.is_first()
    assert hosts.on_first(lambda: {"stored": 3}) == {"stored": 3}
    with pytest.raises(ZeroDivisionError):
        hosts.on_first(lambda: 1 // 0)
    hosts.wait_for_all("nothing")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, and a text."""
    folder = tmp_path_factory.mktemp("hosts")
    config = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 3}
    model = folder / "model"
    write_directory(model, config)
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def child(folder, *command):
    """A process with two devices."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags}
    command = [sys.executable, *command]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start(folder, *arguments, processes=2):
    """The command in several processes; of one, as it is."""
    port = free_port()
    joined = [
        [] if processes == 1 else ["--coordinator", f"localhost:{port}", "--process-id", str(i), "--processes", "2"]
        for i in range(processes)
    ]
    return [child(folder, "-m", "gptq_jax.cli", *arguments, *options) for options in joined]


def succeed(children):
    """What each says."""
    said = [child.communicate(timeout=500) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), said[0][1]
    return [out for out, _ in said]


def finish(children):
    """What the first says; the others say nothing."""
    first, *others = succeed(children)
    assert not any(others)
    return first


def quantize(out):
    return ["quantize", "model", "--out", out, "--calibration", "text.txt", *GRID, *CALIBRATION]


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_go_on_when_one_died(files):
    finish(start(files, *quantize("alone"), processes=1))
    finish(start(files, *quantize("together")))
    alone, together = (load(files / name).params for name in ("alone", "together"))
    assert all(map(np.array_equal, jax.tree.leaves(alone), jax.tree.leaves(together)))
    written = list((files / "together" / "arrays" / "layers.0" / "array_metadatas").iterdir())
    assert len(written) == 2  # each process writes its shards

    evaluation = ["eval", "together", "--text", "text.txt", "--length", "24", "--json"]
    one, two = (json.loads(finish(start(files, *evaluation, processes=n))) for n in (1, 2))
    assert (one["devices"], two["devices"]) == (2, 4)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)

    loading = [str(HERE / "load_child.py"), "together"]
    succeed([child(files, *loading, "one.npy")])
    port = free_port()
    succeed([child(files, *loading, "two.npy", f"localhost:{port}", str(i), "2") for i in range(2)])
    np.testing.assert_allclose(np.load(files / "two.npy"), np.load(files / "one.npy"), rtol=1e-4, atol=1e-5)

    first, second = start(files, *quantize("resumed"))
    block = files / ".resumed.unfinished" / "store" / "arrays" / "layers.0"
    for _ in range(2000):
        if block.is_dir():
            break
        time.sleep(0.1)
    second.kill()
    began = time.monotonic()
    _, error = first.communicate(timeout=120)
    assert first.returncode != 0
    assert time.monotonic() - began < 60
    assert "another task died" in error or "Gloo" in error
    assert not (files / "resumed").exists()
    assert block.is_dir()

    finish(start(files, *quantize("resumed")))
    names = [str(file.relative_to(files / "together")) for file in (files / "together").rglob("*") if file.is_file()]
    assert len(names) > 20
    _, differing, missing = filecmp.cmpfiles(files / "together", files / "resumed", names, shallow=False)
    assert not differing
    assert not missing


@pytest.mark.slow
def test_two_processes_choose_the_bits_that_one_does(files):
    chosen = ["--target-bpw", "3.6"]
    finish(start(files, *quantize("chosen-alone"), *chosen, processes=1))
    finish(start(files, *quantize("chosen-together"), *chosen))
    alone, together = (load(files / name).params for name in ("chosen-alone", "chosen-together"))
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    assert all(map(np.array_equal, jax.tree.leaves(alone), jax.tree.leaves(together)))
