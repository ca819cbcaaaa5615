"""The directory of a comparison: its settings, and a file for each finished cell."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptq_jax.comparison.cells import Cell, CellResult
from gptq_jax.storage.changes import changes
from gptq_jax.storage.directory import check_parent, put_file, put_json

SETTINGS, CELLS, FLOAT = "settings.json", "cells", "float.json"


@dataclass(frozen=True, kw_only=True)
class FloatFigures:
    """Of the model that all cells come from.

    Attributes:
        perplexity: on the held-out text.
        nbytes: of all parameters in memory.
    """

    perplexity: float
    nbytes: int


@dataclass(frozen=True)
class ComparisonDirectory:
    """Where results are kept as they come; every file appears whole or not at all."""

    path: Path

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin a comparison, or go on with the one that is there.

        Raises:
            ValueError: what is there was measured with other settings, each of which is named.
            OSError: something else is there, or it cannot be written.
        """
        file = self.path / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if file.exists():
            differences = _differences(_read(file), wanted)
            if differences:
                raise ValueError(
                    f"{self.path} holds a comparison with other settings: {'; '.join(differences)}. "
                    "Go on with its settings, or choose another directory."
                )
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} exists and holds no comparison: choose another directory.")
        check_parent(self.path.absolute())
        (self.path / CELLS).mkdir(parents=True, exist_ok=True)
        put_json(file, wanted)

    def results(self) -> dict[Cell, CellResult]:
        """Every cell that has been run.

        Raises:
            ValueError: a file is damaged.
        """
        found = {}
        for file in sorted((self.path / CELLS).glob("*.json")):
            data = _read(file)
            try:
                result = CellResult.from_json(data)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file} is no result of this version ({error!r}): delete it to run it anew."
                ) from None
            found[result.cell] = result
        return found

    def put(self, result: CellResult) -> None:
        """Keep what came of a cell; it is on disk when this returns."""
        put_file(self.path / CELLS / f"{result.cell.stem}.json", json.dumps(result.to_json()) + "\n")

    def float_figures(self) -> FloatFigures | None:
        """Those of the float model, if they are known."""
        file = self.path / FLOAT
        if not file.exists():
            return None
        try:
            return FloatFigures(**_read(file))
        except TypeError as error:
            raise ValueError(f"{file} is no result of this version ({error}): delete it to measure anew.") from None

    def put_float(self, figures: FloatFigures) -> None:
        """Keep those of the float model."""
        put_file(self.path / FLOAT, json.dumps(asdict(figures)) + "\n")


def _read(file: Path) -> Any:
    try:
        data = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to run what it tells anew.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds {type(data).__name__}, not an object: delete it to run what it tells anew.")
    return data


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = sorted(changes(there, here), key=lambda change: change[0])
    return [f"{'.'.join(path)} is {_short(one)} there, {_short(two)} here" for path, one, two in found]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
