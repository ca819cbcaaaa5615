"""What long work in memory has come to, in a file, so that it goes on where it was stopped."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptq_jax.storage.changes import changes
from gptq_jax.storage.directory import put_file

EVERY = 60.0  # seconds of work that can be lost


class Progress:
    """One file, replaced as a whole: a pytree of arrays, and how many steps it took.

    Args:
        path: of the file.
        run: all that the result depends on, as plain data; another run must not go on with it.
        steps: what they are called, for people.
        restart: throw away what is there.

    Raises:
        ValueError: the file is of another run, each difference of which is named, or is damaged.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, steps: str = "steps", restart: bool = False) -> None:
        self.path, self.run, self.steps = path, json.loads(json.dumps(run)), steps
        self.done, self._written, self._told = 0, 0, time.monotonic()
        self._leaves: list[np.ndarray] = []
        if restart:
            self.discard()
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                there, self.done = json.loads(str(kept["run"])), int(kept["done"])
                self._written = self.done
                self._leaves = [kept[f"leaf_{number}"] for number in range(len(kept.files) - 2)]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): pass --restart to begin anew.") from error
        if found := changes(there, self.run):
            said = "; ".join(f"{'.'.join(path)} was {before!r}, is {now!r}" for path, before, now in found)
            raise ValueError(f"{self.path} is of another run: {said}. Pass --restart to begin anew.")

    def open(self, before: Any) -> tuple[Any, int]:
        """What the steps that are kept came to, in the form of `before`, and how many they are; itself if none."""
        if not self.done:
            return before, 0
        leaves, tree = jax.tree.flatten(before)
        if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in self._leaves]:
            raise ValueError(f"{self.path} holds other arrays than this run needs: pass --restart to begin anew.")
        arrays = [
            np.asarray(kept) if isinstance(leaf, np.ndarray) else jax.numpy.asarray(kept, leaf.dtype)
            for kept, leaf in zip(self._leaves, leaves, strict=True)
        ]
        self._leaves = []
        return jax.tree.unflatten(tree, arrays), self.done

    def keep(self, arrays: Any, done: int, *, now: bool = False) -> None:
        """Take one more step, and write now and then, or `now`."""
        self.done = done
        if not now and time.monotonic() - self._told < EVERY:
            return
        content = io.BytesIO()
        leaves = {f"leaf_{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(arrays))}
        np.savez(content, run=json.dumps(self.run), done=done, **leaves)  # type: ignore[arg-type]
        put_file(self.path, content.getvalue())
        self._written, self._told = done, time.monotonic()

    def kept(self) -> str:
        """What an interrupted run leaves, for people."""
        if not self._written:
            return f"no {self.steps} are kept"
        return f"{self._written} {self.steps} are kept; the same command goes on"

    def discard(self) -> None:
        """The work is done."""
        self.path.unlink(missing_ok=True)
