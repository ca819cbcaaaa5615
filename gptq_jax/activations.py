"""What the calibration is between two blocks of a model: kept by the host, fed to the devices round by round."""

import tempfile
from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped


class Slot(NamedTuple):
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Activations:
    """A list of states, pytrees of numpy arrays, in memory or in a file without a name, which goes with the process.

    An array that is read from the file is a copy: no page of the file counts as memory of this process for longer
    than that takes.
    """

    def __init__(self, directory: str | PathLike[str] | None = None) -> None:
        """Make an empty list.

        Args:
            directory: of the file; None: states stay in memory.

        Raises:
            OSError: no file can be written there.
        """
        # Open for as long as the list lives.
        self._file = None if directory is None else tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._end = 0
        self._states: list[Any] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        if self._file is None:
            return self._states[index]
        return jax.tree.map(self._read, self._states[index], is_leaf=_is_slot)

    def rows(self, index: int, rows: slice) -> Any:
        """Some rows of the arrays of a state; no more are read."""
        if self._file is None:
            return jax.tree.map(lambda array: array[rows], self._states[index])
        return jax.tree.map(lambda slot: self._read(slot, rows), self._states[index], is_leaf=_is_slot)

    def __setitem__(self, index: int, state: Any) -> None:
        if self._file is None:
            self._states[index] = state
            return
        leaves, structure = jax.tree.flatten(state)
        before = jax.tree.leaves(self._states[index], is_leaf=_is_slot)
        slots = [self._slot(leaf, before[place] if place < len(before) else None) for place, leaf in enumerate(leaves)]
        for leaf, slot in zip(leaves, slots, strict=True):
            self._map(slot, "r+")[...] = leaf
        self._states[index] = jax.tree.unflatten(structure, slots)

    def append(self, state: Any) -> None:
        """Add a state at the end."""
        self._states.append(None)
        self[len(self) - 1] = state

    def _slot(self, array: Shaped[np.ndarray, "..."], before: Slot | None) -> Slot:
        """Where an array goes: in place of the one before, if it is as large."""
        if before is not None and (before.shape, before.dtype) == (array.shape, array.dtype):
            return before
        slot = Slot(self._end, array.shape, array.dtype)
        self._end += array.nbytes
        return slot

    def _map(self, slot: Slot, mode: Any) -> Shaped[np.ndarray, "..."]:
        assert self._file is not None
        return np.memmap(self._file, slot.dtype, mode, slot.offset, slot.shape)

    def _read(self, slot: Slot, rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        return np.array(self._map(slot, "r") if rows is None else self._map(slot, "r")[rows])


def _is_slot(node: Any) -> bool:
    return isinstance(node, Slot)
