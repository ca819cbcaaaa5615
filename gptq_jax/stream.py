"""The calibration on its way through a model: batches in rounds, one for each device, from block to block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool

from gptq_jax.activations import Activations
from gptq_jax.hooks.experts import Routed
from gptq_jax.hooks.nnx import Input, Params
from gptq_jax.models.quantizable import Calibration, Forward
from gptq_jax.parallel import DataParallel
from gptq_jax.parallel.data import on_host
from gptq_jax.tuning.fit import Example

Inputs = dict[str, Input]  # of linear layers by path

# Of inputs that are kept while a block is solved; beyond it they are computed again.
KEPT_BYTES = 2 * 2**30
STREAMED_BYTES = 2**28  # where memory is not to grow beyond what a block needs


@dataclass(frozen=True, kw_only=True)
class Round:
    """Batches of one shape that run at once, one on each device, the last again where there are not enough.

    Attributes:
        mask: True for real tokens, the batches' one after another; None if all are.
        real_tokens: of the masks, without repeats; None if all are.
        live: which devices have a batch of their own.
    """

    mask: Bool[Array, "rows time"] | None
    real_tokens: int | None
    live: Bool[np.ndarray, "devices"]

    def real(self, places: int) -> int:
        """Of `places` in all batches: those of batches that are no repeats."""
        return places * int(self.live.sum()) // self.live.size


class Window(NamedTuple):
    """Part of the calibration.

    Attributes:
        number: of the round.
        rows: of its states; None: all of them.
        mask: True for real tokens, on the host; None if all are.
    """

    number: int
    rows: slice | None
    mask: Bool[np.ndarray, "rows time"] | None

    def of(self, states: Activations) -> Any:
        """This part of `states`."""
        return states[self.number] if self.rows is None else states.rows(self.number, self.rows)


@dataclass(kw_only=True)
class Stream:
    """What the blocks done so far make of the calibration, and what the layers of the next are fed.

    Each device runs a batch as one device alone would, so that the number of devices changes nothing.

    Attributes:
        rounds: that it is made of.
        states: before the block, of each round.
        parallel: the devices.
        budget: bytes of inputs that are kept while a block is solved; beyond it they are computed again.
        by_rows: states have the rows of the batch first.
    """

    rounds: Sequence[Round]
    states: Activations
    parallel: DataParallel
    budget: int
    by_rows: bool
    known: list[Inputs] = field(default_factory=list)

    def capture(
        self, forward: Forward, params: Params, groups: Sequence[tuple[str, ...]], *, keep: bool
    ) -> Iterator[tuple[Round, Inputs, dict[str, int]]]:
        """Round by round: the input of the first layer of each group, and how many places it should have.

        Args:
            forward: of the block.
            params: its parameters.
            groups: layers that share an input.
            keep: so that what comes after these layers need not compute it again, as far as `budget` goes.
        """
        self.known = self.known or [{} for _ in self.rounds]
        wanted = tuple(group[0] for group in groups)
        kept = _nbytes(self.known)
        for number, x in self._fed():
            this, known = self.rounds[number], self.known[number]
            captured = self.parallel.run(_capture, forward, wanted, params=params, batches=(x, this.mask, known))
            yield this, captured, {path: forward.rows(x, path) for path in wanted}
            if keep:
                for path, group in zip(wanted, groups, strict=True):
                    kept += _nbytes([{path: captured[path]}])
                    if kept <= self.budget:
                        known.update(dict.fromkeys(group, captured[path]))

    def leave(self, forward: Forward, params: Params) -> None:
        """Go on to the state after the block."""
        known = self.known or [{} for _ in self.rounds]
        self.known = []
        before: tuple[int, Any] | None = None
        for number, x in self._fed():
            batches = (x, self.rounds[number].mask, known[number])
            after = self.parallel.run(_run, forward, params=params, batches=batches)
            known[number] = {}
            # The one before is fetched while this one is computed.
            if before is not None:
                self.states[before[0]] = self.parallel.fetch(before[1])
            before = number, after
        if before is not None:
            self.states[before[0]] = self.parallel.fetch(before[1])

    def forget(self) -> None:
        """Drop inputs that are kept: layers that computed them have changed."""
        self.known = []

    def windows(self) -> list[Window]:
        """Where the calibration is cut into the least parts that can run alone, less those that are all padding."""
        found = []
        for number, this in enumerate(self.rounds):
            mask = None if this.mask is None else np.asarray(this.mask)
            cuts: list[slice | None] = [None]
            if self.by_rows:
                rows = this.real(len(jax.tree.leaves(self.states[number])[0]))
                cuts = [slice(row, row + 1) for row in range(rows)]
            for cut in cuts:
                part = mask if mask is None or cut is None else mask[cut]
                if part is None or part.any():
                    found.append(Window(number, cut, part))
        return found

    def _fed(self) -> Iterator[tuple[int, Any]]:
        """The states on the devices, the next on its way while one is worked on."""
        ahead = self.parallel.feed(self.states[0])
        for number in range(len(self.states)):
            x = ahead
            if number + 1 < len(self.states):
                ahead = self.parallel.feed(self.states[number + 1])
            yield number, x


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """What a block is tuned on, read when it is asked for.

    Attributes:
        windows: of the calibration.
        states: before the block, in the model as it is quantized so far.
        targets: after it, in the float model.
    """

    windows: Sequence[Window]
    states: Activations
    targets: Activations

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Any:
        window = self.windows[index]
        example = Example(window.of(self.states), window.of(self.targets), window.mask)
        return jax.tree.map(jax.numpy.asarray, example)


def open_stream(
    calibration: Calibration,
    shapes: Sequence[Any],
    parallel: DataParallel,
    *,
    budget: int,
    directory: str | PathLike[str] | None = None,
) -> Stream:
    """The calibration before the first block.

    Args:
        calibration: of a model.
        shapes: of its batches: those with equal ones run together.
        parallel: the devices.
        budget: as in `Stream`.
        directory: as for `Activations`.
    """
    states, rounds = Activations(directory), []
    started = iter(calibration.start())
    alike = groupby(range(len(shapes)), lambda number: (shapes[number], calibration.masks[number] is None))
    for numbers in (cut for _, group in alike for cut in _cut(list(group), parallel.size)):
        # The last batch again, for devices that would have none.
        repeats = [*numbers, *[numbers[-1]] * (parallel.size - len(numbers))]
        parts = [next(started) for _ in numbers]
        parts += [parts[-1]] * (parallel.size - len(numbers))
        own = [jax.tree.map(on_host, parts[place]) for place in parallel.here]
        states.append(own[0] if parallel.mesh is None else np.concatenate(own))
        masks = [np.asarray(mask) for number in repeats if (mask := calibration.masks[number]) is not None]
        rounds.append(
            Round(
                mask=_joined(masks, parallel) if masks else None,
                real_tokens=int(sum(mask.sum() for mask in masks[: len(numbers)])) if masks else None,
                live=np.arange(parallel.size) < len(numbers),
            )
        )
    by_rows = calibration.one_device is None
    return Stream(rounds=rounds, states=states, parallel=parallel, budget=budget, by_rows=by_rows)


def fork(stream: Stream, directory: str | PathLike[str] | None = None) -> Stream:
    """Another that begins where this one is; `directory` as for `Activations`."""
    states = Activations(directory)
    for state in stream.states:
        states.append(state)
    return replace(stream, states=states, known=[])


def places(captured: Input) -> int:
    """Tokens that a layer saw, padding and repeats included."""
    if isinstance(captured, Routed):
        return captured.weights.shape[0]
    return captured.size // captured.shape[-1]


def _joined(masks: Sequence[np.ndarray], parallel: DataParallel) -> Array:
    """Of the batches of a round, on their devices."""
    return parallel.feed(np.concatenate([masks[place] for place in parallel.here]))  # type: ignore[return-value]


def _cut(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _capture(
    forward: Forward, wanted: tuple[str, ...], params: Params, x: Any, mask: Array | None, known: Inputs
) -> Inputs:
    return forward.capture(params, x, wanted, mask, known)


def _run(forward: Forward, params: Params, x: Any, mask: Array | None, known: Inputs) -> Any:
    return forward.run(params, x, mask, known)


def _nbytes(known: list[Inputs]) -> int:
    arrays = {id(array): array.nbytes for array in jax.tree.leaves(known)}
    return sum(arrays.values())
