"""Loading directories whose files are damaged: what must hold whether they are accepted or refused."""

import os
import signal
import sys
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np

from gptq_jax import CheckpointError, QuantizedTensor, load
from gptq_jax.inspection import inspect_model
from gptq_jax.tensor import validate

SECONDS = 60  # a pause of the machine is no hang
SLACK = 16 * 2**20  # bytes for the interpreter's own objects
OPENED: list[str] = []
_watching = False


def _audit(event, arguments):
    if _watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def within_bounds(directory, size):
    """A time limit, a limit on what is allocated, and no file opened outside of `directory`."""
    global _watching

    def stop(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    OPENED.clear()
    tracemalloc.start()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert peak < 4 * size + SLACK, f"{peak} bytes allocated for {size} on disk"
    data = [
        path for path in OPENED if path.endswith((".json", ".safetensors", ".msgpack")) and "site-packages" not in path
    ]
    outside = [path for path in data if Path(path).resolve().parent != directory.resolve()]
    assert not outside


def accepts(directory, files):
    """Load a directory of these files; whether it was accepted."""
    for old in directory.iterdir():
        old.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    size = sum(map(len, files.values()))
    try:
        with within_bounds(directory, size):
            model = load(directory)
    except CheckpointError as error:
        text = str(error)
        assert text.startswith(str(directory)), text
        assert len(text) < 5000, text
        with suppress(CheckpointError):  # it does not read weights, so it may find nothing wrong
            inspect_model(str(directory))
        return False
    for leaf in jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)):
        if isinstance(leaf, QuantizedTensor):
            validate(leaf)
        else:
            assert np.isfinite(np.asarray(leaf)).all()
    return True


def edit(rng, data, at, kind):
    """Change a file's bytes in place: replace or flip one, insert some, remove some, or repeat some (`kind` 0 to 4)."""
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
    elif kind == 3:
        del data[at : at + rng.randrange(1, 9)]
    else:
        data[at:at] = data[at : at + rng.randrange(1, 65)]


def perhaps_cut(rng, data):
    """The bytes, one time in twenty cut off."""
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.05 else data)
