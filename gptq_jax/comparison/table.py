"""Results as a table: the mean over seeds of each method at each grid, and how far the seeds are apart."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gptq_jax.comparison.cells import CellResult, Figures
from gptq_jax.comparison.store import FloatFigures
from gptq_jax.report import spec_label
from gptq_jax.spec import QuantSpec


@dataclass(frozen=True)
class Spread:
    """Of one figure over seeds.

    Attributes:
        mean: arithmetic.
        deviation: sample standard deviation; None for a single seed.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """At least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Column:
    """A figure of the table.

    Attributes:
        name: in files.
        title: for people.
        read: from a cell's figures; None where it is not known.
        show: one value, for people.
        of_float: the same of the float model.
    """

    name: str
    title: str
    read: Callable[[Figures], float | None]
    show: Callable[[float], str]
    of_float: Callable[[FloatFigures], float | None] = lambda figures: None


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


COLUMNS = (
    Column("perplexity", "perplexity", lambda f: f.perplexity, "{:.3f}".format, lambda f: f.perplexity),
    Column("kl", "KL to float", lambda f: f.kl, "{:.4f}".format, lambda f: 0.0),
    Column("top1_agreement", "top-1 agreement", lambda f: f.top1_agreement, "{:.1%}".format, lambda f: 1.0),
    Column("bits_per_weight", "bits per weight", lambda f: f.bits_per_weight, "{:.3f}".format),
    Column("bytes", "MB", lambda f: float(f.nbytes), _megabytes, lambda f: float(f.nbytes)),
    Column("seconds", "seconds", lambda f: f.seconds, "{:.1f}".format),
    Column("compile_seconds", "compiling", lambda f: f.compile_seconds, "{:.1f}".format),
    Column("peak_bytes", "peak MB", lambda f: None if f.peak_bytes is None else float(f.peak_bytes), _megabytes),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at a grid.

    Attributes:
        method, spec: which.
        seeds: of the cells that gave figures.
        values: by the columns' names; without those that are not known.
        failed: seed -> why.
        fallbacks: layers rounded to nearest after all, in any of the cells.
    """

    method: str
    spec: QuantSpec
    seeds: tuple[int, ...]
    values: Mapping[str, Spread]
    failed: Mapping[int, str]
    fallbacks: tuple[str, ...]

    @property
    def grid(self) -> str:
        """Like "W4 g64 sym"."""
        return spec_label(self.spec)


@dataclass(frozen=True, kw_only=True, repr=False)
class ComparisonTable:
    """What a comparison found.

    Attributes:
        float_figures: of the model that all came from.
        cells: in the order of the table: grids with more bits first, methods as they were asked for.
        settings: what all cells have in common.
        names: what the model and the texts are called, for people.
    """

    float_figures: FloatFigures
    cells: tuple[CellResult, ...]
    settings: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        float_figures: FloatFigures,
        results: Iterable[CellResult],
        settings: Mapping[str, Any],
        order: Sequence[str] = (),
    ) -> "ComparisonTable":
        """Put cells into order; methods that `order` does not name come last."""

        def place(result: CellResult) -> tuple[Any, ...]:
            name, spec = result.cell.method, result.cell.spec
            group = spec.group_size if spec.group_size > 0 else float("inf")
            method = order.index(name) if name in order else len(order)
            return -spec.bits, group, not spec.symmetric, str(spec.scale_dtype), method, name, result.cell.seed

        return cls(float_figures=float_figures, cells=tuple(sorted(results, key=place)), settings=settings)

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names, in the order of the table."""
        return tuple(dict.fromkeys(result.cell.method for result in self.cells))

    @property
    def failures(self) -> tuple[CellResult, ...]:
        """Cells that have no figures."""
        return tuple(result for result in self.cells if result.failed is not None)

    def rows(self) -> list[Row]:
        """The cells of each method and grid as one."""
        groups: dict[tuple[str, QuantSpec], list[CellResult]] = {}
        for result in self.cells:
            groups.setdefault((result.cell.method, result.cell.spec), []).append(result)
        return [_row(method, spec, results) for (method, spec), results in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data; None for a number that is not finite, which JSON has no word for."""
        return _finite(
            {
                "names": dict(self.names),
                "settings": dict(self.settings),
                "float": asdict(self.float_figures),
                "rows": [_plain(row) for row in self.rows()],
                "cells": [result.to_json() for result in self.cells],
            }
        )

    def markdown(self) -> str:
        """For a document; a notebook, or Python itself, shows it so."""
        header = ["method", "grid", *(column.title for column in COLUMNS)]
        of_float = [_float_value(column, self.float_figures) for column in COLUMNS]
        lines = [header, ["float", "", *of_float]]
        lines += [[row.method, row.grid, *shown(row)] for row in self.rows()]
        align = ["---", "---", *("---:" for _ in COLUMNS)]
        table = [lines[0], align, *lines[1:]]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)
        notes = [f"- {note}" for note in self.remarks()]
        return text + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")

    _repr_markdown_ = __repr__ = markdown  # Jupyter asks for the first

    def csv(self) -> str:
        """The same for a spreadsheet: means, deviations over seeds, and why cells failed."""
        out = io.StringIO()
        names = [name for column in COLUMNS for name in (column.name, f"{column.name}_deviation")]
        spec = ["bits", "group_size", "symmetric"]
        writer = csv.DictWriter(out, ["method", *spec, "seeds", *names, "failed"], lineterminator="\n")
        writer.writeheader()
        of_float = {column.name: column.of_float(self.float_figures) for column in COLUMNS}
        writer.writerow({"method": "float", **of_float})
        for row in self.rows():
            means = {name: spread.mean for name, spread in row.values.items()}
            deviations = {f"{name}_deviation": spread.deviation for name, spread in row.values.items()}
            failed = "; ".join(f"seed {seed}: {why}" for seed, why in row.failed.items())
            which = {name: getattr(row.spec, name) for name in spec}
            writer.writerow(
                {"method": row.method, **which, "seeds": len(row.seeds), **means, **deviations, "failed": failed}
            )
        return out.getvalue()

    def remarks(self) -> list[str]:
        """What the figures alone do not say."""
        found = []
        counts = {len(row.seeds) for row in self.rows() if row.seeds}
        if counts - {1}:
            found.append("mean ± sample standard deviation over seeds of the calibration windows.")
        for count in sorted(counts - {max(counts, default=0)}):
            which = ", ".join(f"{row.method} ({row.grid})" for row in self.rows() if len(row.seeds) == count)
            found.append(f"of {count} seed{'s' * (count > 1)} only: {which}.")
        for row in self.rows():
            if row.fallbacks:
                found.append(f"{row.method}, {row.grid}: rounded to nearest after all: {', '.join(row.fallbacks)}.")
        found += [f"{result.cell.label} failed: {result.failed}" for result in self.failures]
        return found


def shown(row: Row) -> list[str]:
    """A row's figures for people, in the order of the columns."""
    if not row.seeds:
        return ["failed", *("" for _ in COLUMNS[1:])]
    return [_spread(column, row.values.get(column.name)) for column in COLUMNS]


def _spread(column: Column, spread: Spread | None) -> str:
    if spread is None:
        return ""
    text = column.show(spread.mean)
    return text if not spread.deviation else f"{text} ± {column.show(spread.deviation)}"


def _float_value(column: Column, figures: FloatFigures) -> str:
    value = column.of_float(figures)
    return "" if value is None else column.show(value)


def _row(method: str, spec: QuantSpec, results: Sequence[CellResult]) -> Row:
    found = [(result.cell.seed, result.figures) for result in results if result.figures is not None]
    values = {}
    for column in COLUMNS:
        numbers = [value for _, figures in found if (value := column.read(figures)) is not None]
        if numbers:
            values[column.name] = Spread.of(numbers)
    return Row(
        method=method,
        spec=spec,
        seeds=tuple(seed for seed, _ in found),
        values=values,
        failed={result.cell.seed: result.failed for result in results if result.failed is not None},
        fallbacks=tuple(dict.fromkeys(path for _, figures in found for path in figures.fallbacks)),
    )


def _plain(row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "values": {name: asdict(spread) for name, spread in row.values.items()},
        "failed": {str(seed): why for seed, why in row.failed.items()},
    }


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
