"""A store that is written block by block, and gone on with where a killed process left it.

Beside the target DIR lies .DIR.unfinished until the last step:

remains.json   what the run is made of: another run must not go on with it
store/         becomes DIR: arrays/layers.0, ... each there only when it is whole and on disk
blocks/N.json  what the manifest and the report will say of block N
writing/       the part being written
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Architecture
from gptq_jax.parallel.hosts import is_first, on_first
from gptq_jax.report import LayerReport, Report, layer_report
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.changes import changes
from gptq_jax.storage.directory import (
    acquire,
    beside,
    check_target,
    discard,
    put_json,
    release,
    sync,
    sync_tree,
    take_place,
    write_json,
)
from gptq_jax.storage.manifest import ARRAYS, RUN, read_json, verify
from gptq_jax.storage.parts import Part, prefix_of, read_part, repacked, stored_shapes, write_part
from gptq_jax.storage.store import complete

FORMAT = 1  # of what is kept between processes
_REMAINS = "remains.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoreSink:
    """Where `quantize_blocks` puts a model: a store like that of `save`, to the byte, for every way a run can go.

    A block is on disk before the next one begins. What a killed or interrupted process leaves beside the target is
    taken up by the next run of the same settings, model and calibration, and refused to any other. The target appears,
    or is replaced, at the end and in one step.

    Args:
        path: of the store; its parent must exist.
        model: what is quantized, of `open_checkpoint` or `load`: the embedding, the head, the config and the tokenizer
            are stored too.
        overwrite: replace a directory that this library wrote.
        restart: throw away what an earlier run left unfinished.
        nbytes: of the store, as far as known; there must be room for it.
        settings: beyond what `quantize_blocks` notes: they enter the report, and tell runs apart.
        on_open: called when the run begins, with how many blocks are stored already, and how many there are.

    Raises:
        OSError: see `check_target`.
        ValueError: `model` is no supplied architecture.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Any,
        *,
        overwrite: bool = False,
        restart: bool = False,
        nbytes: int = 0,
        settings: Mapping[str, Any] | None = None,
        on_open: Callable[[int, int], None] | None = None,
    ) -> None:
        if not isinstance(getattr(model, "config", None), Architecture):
            raise ValueError(
                f"a {type(model).__name__} cannot be stored block by block: quantize it in memory and save it."
            )
        self.path = Path(path).resolve()
        self.model, self.overwrite, self.restart = model, overwrite, restart
        self.settings, self._on_open = dict(settings or {}), on_open
        self.unfinished = beside(self.path, "unfinished")
        self._blocks = model.config.abstract_params()["layers"]
        self._lock: Any = None
        on_first(partial(self._check, nbytes))

    def _check(self, nbytes: int) -> None:
        there = sum(file.stat().st_size for file in self.unfinished.rglob("*") if file.is_file())
        check_target(self.path, overwrite=self.overwrite, nbytes=max(nbytes - there, 0))

    def open(self, run: Mapping[str, Any]) -> int:
        """Begin a run, or go on with it.

        Args:
            run: all that its result depends on, as plain data.

        Returns:
            How many blocks are stored already.

        Raises:
            BlockingIOError: another process writes there.
            ValueError: another run's remains are there; each difference is named.
        """
        self.close()
        settings = {**run.get("settings", {}), **self.settings}
        run = json.loads(json.dumps({**run, "settings": settings}))  # as it will be read
        stored = on_first(lambda: self._open(run))
        if self._on_open is not None and is_first():
            self._on_open(stored, len(self._blocks))
        return stored

    def _open(self, run: Mapping[str, Any]) -> int:
        self._lock = acquire(self.path)
        try:
            if self.restart or not self._goes_on(run):
                self._begin(run)
            return self._stored()
        except BaseException:
            self.close()
            raise

    def read(self, index: int) -> tuple[Params, list[LayerReport]]:
        """One stored block and the reports of its layers.

        Raises:
            CheckpointError: it is damaged.
        """
        store, name = self.unfinished / "store", f"layers.{index}"
        entries, layers = self._entries(name)
        verify(store, entries.files)
        abstract, prefix = self._blocks[index], prefix_of(name)
        arrays = read_part(store / ARRAYS / name, stored_shapes(store, entries, abstract, prefix))
        return repacked(arrays, entries.quantized, abstract, prefix), layers

    def write(self, index: int, params: Params, layers: list[LayerReport]) -> None:
        """Store one finished block; it is on disk when this returns."""
        self._write(f"layers.{index}", params, layers)

    def finish(self, report: Report) -> Path:
        """Complete the store and give it its name.

        Raises:
            ValueError: a block is missing.
            FileExistsError: something has come there since the run began, and may not be replaced.
        """
        stored = on_first(self._stored)
        if stored != len(self._blocks):
            raise ValueError(f"{stored} of {len(self._blocks)} blocks are stored: write the others before finish.")
        for name in ("embed", "head"):
            if not on_first(partial(self._is_stored, name)):
                self._write(name, self.model.params[name], [])
        on_first(lambda: self._complete(report))
        self.close()
        return self.path

    def _complete(self, report: Report) -> None:
        store = self.unfinished / "store"
        names = ["embed", *(f"layers.{index}" for index in range(len(self._blocks))), "head"]
        parts = [self._entries(name)[0] for name in names]
        report = replace(report, settings={**report.settings, **self.settings})
        complete(store, parts, source=self.model.source, report=report.to_json(), tokenizer=self.model.tokenizer)
        sync_tree(store)
        check_target(self.path, overwrite=self.overwrite)
        take_place(store, self.path)
        discard(self.unfinished)

    def kept(self) -> str:
        """What an interrupted run leaves, in words."""
        if not (stored := self._stored()):
            return f"no block was done, and nothing is at {self.path}"
        return (
            f"{stored} of {len(self._blocks)} blocks are kept in {self.unfinished}; the same command goes on after them"
        )

    def close(self) -> None:
        """Let others write there; blocks that are stored stay, to be gone on with."""
        if self._lock is not None:
            if not self._stored():
                discard(self.unfinished)
            release(self._lock)
            self._lock = None

    def __enter__(self) -> "StoreSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, run: Mapping[str, Any]) -> None:
        discard(self.unfinished)
        for folder in (self.unfinished / "store" / ARRAYS, self.unfinished / "blocks"):
            folder.mkdir(parents=True)
        write_json(self.unfinished / "store" / RUN, run)
        sync_tree(self.unfinished)
        put_json(self.unfinished / _REMAINS, {"format": FORMAT, "run": run})
        sync(self.path.parent)

    def _goes_on(self, run: Mapping[str, Any]) -> bool:
        """Whether there are remains of this very run; ValueError if they are of another."""
        file = self.unfinished / _REMAINS
        if not file.is_file():
            return False  # nothing, or what was not even begun
        remains = read_json(file)
        if not isinstance(remains, dict) or remains.get("format") != FORMAT:
            raise ValueError(
                f"{self.unfinished} was left by a run of another version of gptq-jax: go on with that version, or "
                "throw it away with --restart (restart=True)."
            )
        stored = self.unfinished / "store" / RUN
        if not stored.is_file() or read_json(stored) != remains["run"]:
            return False  # the store has its name already: this is what it replaced
        if found := differences(remains["run"], run):
            raise ValueError(
                f"{self.unfinished} holds {self._stored()} of {len(self._blocks)} blocks of another run: "
                f"{'; '.join(found)}. Use the same settings to go on with it, or throw it away with --restart "
                "(restart=True)."
            )
        return True

    def _stored(self) -> int:
        """How many blocks are stored, from the first on."""
        return next((i for i in range(len(self._blocks)) if not self._is_stored(f"layers.{i}")), len(self._blocks))

    def _is_stored(self, name: str) -> bool:
        return (self.unfinished / "store" / ARRAYS / name).is_dir()

    def _write(self, name: str, params: Params, layers: list[LayerReport]) -> None:
        writing = self.unfinished / "writing"
        on_first(lambda: discard(writing))
        entries = write_part(writing, name, params)
        # First this, of which nothing is believed until the part has its name.
        description = {**asdict(entries), "layers": [asdict(layer) for layer in layers]}
        on_first(lambda: self._keep(name, description))

    def _keep(self, name: str, description: Mapping[str, Any]) -> None:
        writing, arrays = self.unfinished / "writing", self.unfinished / "store" / ARRAYS
        sync_tree(writing)
        put_json(self.unfinished / "blocks" / f"{name}.json", description)
        os.rename(writing, arrays / name)
        sync(arrays)

    def _entries(self, name: str) -> tuple[Part, list[LayerReport]]:
        file = self.unfinished / "blocks" / f"{name}.json"
        try:
            content = dict(read_json(file))
            layers = [layer_report(layer) for layer in content.pop("layers")]
            return Part(**content), layers
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(file, f"is damaged ({error}): start anew with --restart (restart=True).") from error


def differences(old: Any, new: Any) -> list[str]:
    """Where two trees of plain data differ, each a phrase with both values; of digests only that they do."""
    return [_phrase(" ".join(path), before, now) for path, before, now in changes(old, new)]


def _phrase(name: str, old: Any, new: Any) -> str:
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        return f"{name} is another"
    return f"{name} was {_shown(old)}, and is {_shown(new)} now"


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)
