"""Kill a quantization with SIGKILL at random moments, start it again, and compare what comes of it with a run in peace.

A moment is a random time after one of the run's steps (its first trace, a block stored, the head, the manifest), so
that they are spread over the run however fast the machine is at the time. Every second run replaces an older store.
After each kill the target must be as it was before or complete; after the same command again it must hold the same
files, byte for byte, with nothing left beside it. Exit code 1 if one differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import TEXT, write_llama

BLOCKS = 6
SETTINGS = ("--samples", "8", "--length", "64", "--group-size", "32")


def start(folder: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    """The command, in a process of its own whose programs are compiled once for all runs."""
    command = ("quantize", str(folder / "model"), "--out", str(out), "--calibration", str(folder / "text.txt"))
    # Programs from the cache are those that were compiled: without it a run would be compilation most of the time.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "gptq_jax.cli", *command, *SETTINGS, *more],
        env={**os.environ, **cache, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(out: Path) -> list[Path]:
    """What appears one after the other while the store `out` is written."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    arrays = unfinished / "store" / "arrays"
    parts = [*(f"layers.{index}" for index in range(BLOCKS)), "embed", "head"]
    return [unfinished, *(arrays / part for part in parts), unfinished / "store" / "gptq_jax.json"]


def wait_for(path: Path, process: "subprocess.Popen[str]") -> float:
    """When there is something at `path`, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)
    return time.monotonic()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def trial(folder: Path, step: int, delay: float, expected: dict[str, bytes], old: Path | None) -> tuple[str, bool]:
    """Kill a run `delay` seconds after a step, and go on: what was seen, and whether all was right."""
    place = Path(tempfile.mkdtemp(dir=folder))
    out, more = place / "out", () if old is None else ("--overwrite",)
    if old is not None:
        shutil.copytree(old, out)
    process = start(folder, out, *more)
    wait_for(steps(out)[step], process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    blocks = len(list(place.glob(".out.unfinished/store/arrays/layers.*")))
    found = contents(out) if out.exists() else None
    if found == expected:
        seen, torn = "complete already", False
    else:
        seen = f"{blocks} of {BLOCKS} blocks" + (", in the last step" if blocks == BLOCKS else "")
        torn = found != (None if old is None else contents(old))
    if found == expected and old is None:
        return seen, True
    again = start(folder, out, *more)
    errors = again.communicate()[1]
    left = sorted(os.listdir(place))
    same = again.returncode == 0 and contents(out) == expected and left == ["out"]
    if again.returncode:
        seen += f"; then it ended with {again.returncode}: {errors.strip().splitlines()[-1:]}"
    went_on = "interrupted run left" in errors
    verdict = "TORN" if torn else "same bytes" if same else f"NOT THE SAME (beside it: {left})"
    return f"{seen}; {'went on' if went_on else 'began anew'}: {verdict}", same and not torn


def main() -> None:
    """Print the outcome of each kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder / "model", blocks=BLOCKS, width=64, hidden=160, context=128)
        (folder / "text.txt").write_text(TEXT)
        start(folder, folder / "old", "--bits", "8").wait()
        start(folder, folder / "first").wait()  # compiles
        process = start(folder, folder / "peace")
        times = [wait_for(path, process) for path in steps(folder / "peace")]
        process.wait()
        lengths = [after - before for before, after in zip(times, [*times[1:], time.monotonic()], strict=True)]
        expected = contents(folder / "peace")
        if not expected or expected != contents(folder / "first"):
            sys.exit("two runs in peace gave different files")
        print(f"a run in peace: {len(expected)} files, {sum(lengths):.1f} s in {len(lengths)} steps", flush=True)
        wrong = 0
        for number in range(options.moments):
            step = (number // 2) % len(lengths)
            delay = draw.random() * lengths[step]
            seen, right = trial(folder, step, delay, expected, folder / "old" if number % 2 else None)
            print(f"{number + 1:3}. killed {delay:.3f} s after step {step}: {seen}", flush=True)
            wrong += not right
        print(f"{options.moments - wrong} of {options.moments} as they should be")
        sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
