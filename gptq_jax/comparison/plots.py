"""Pictures of a comparison, by matplotlib: an optional package, asked for where it is needed."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gptq_jax.comparison.table import ComparisonTable, Row
from gptq_jax.report import spec_label
from gptq_jax.spec import QuantSpec

MISSING = "plots need matplotlib: pip install 'gptq-jax[compare]', or go without (--no-plots)."
# Okabe and Ito's colours, which the colour-blind can tell apart; a method keeps its own in all plots.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
_BEYOND = 20  # times the float model's perplexity: no use, and no reason to press all others together
_PANELS = 12  # at most: more kinds of layers than that go into one


def check_matplotlib() -> None:
    """Raise ImportError, with the remedy, if there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error


def perplexity_by_bits(table: ComparisonTable) -> Any:
    """Perplexity against bits per weight: a line for each method, error bars over seeds, the float model dashed."""
    figure, axes = _figure(8.5, 5.0)
    for index, method in enumerate(table.methods):
        rows = [row for row in table.rows() if row.method == method and row.seeds]
        for symmetric in sorted({row.spec.symmetric for row in rows}):
            part = sorted(
                (row for row in rows if row.spec.symmetric == symmetric), key=lambda row: _mean(row, "bits_per_weight")
            )
            suffix = "" if len({row.spec.symmetric for row in rows}) < 2 else " sym" if symmetric else " asym"
            axes.errorbar(
                [_mean(row, "bits_per_weight") for row in part],
                [_mean(row, "perplexity") for row in part],
                yerr=[row.values["perplexity"].deviation or 0.0 for row in part],
                label=method + suffix,
                capsize=3,
                linestyle="--" if suffix == " asym" else "-",
                **_style(index),
            )
    _float_line(axes, table)
    _decades(axes)
    _end(axes, table, lambda row: _mean(row, "bits_per_weight"))
    axes.set(xlabel="bits per weight of the quantized layers", ylabel="perplexity, held-out text")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def perplexity_by_time(table: ComparisonTable) -> Any:
    """Perplexity against seconds of quantizing, less compilation; colours are methods, shapes are grids."""
    figure, axes = _figure(8.5, 5.0)
    shapes = dict(
        zip(dict.fromkeys(row.grid for row in table.rows() if row.seeds), itertools.cycle(_MARKERS), strict=False)
    )
    for index, method in enumerate(table.methods):
        again = index >= len(_COLOURS)  # a colour that another method has: hollow, and dotted in the legend
        how = {"color": _style(index)["color"], "fillstyle": "none" if again else "full"}
        rows = [row for row in table.rows() if row.method == method and row.seeds]
        for row in rows:
            axes.plot([_seconds(row)], [_mean(row, "perplexity")], linestyle="", marker=shapes[row.grid], **how)
        if rows:
            axes.plot(
                [], [], label=method, linewidth=3, color=how["color"], linestyle="-" if index < len(_COLOURS) else ":"
            )
    for grid, shape in shapes.items():
        axes.plot([], [], label=grid, marker=shape, color="0.4", linestyle="")
    _float_line(axes, table)
    _decades(axes)
    _end(axes, table, _seconds)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set(xlabel="seconds to quantize, compilation left out", ylabel="perplexity, held-out text")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def layer_errors(table: ComparisonTable, spec: QuantSpec) -> Any:
    """The relative output error of each layer at one grid: a panel for each kind of layer, a line for each method."""
    errors = {
        method: _errors(table, method, spec)
        for method in table.methods
        if any(result.figures and (result.cell.method, result.cell.spec) == (method, spec) for result in table.cells)
    }
    kinds = list(dict.fromkeys(kind for by_kind in errors.values() for kind in by_kind))
    if len(kinds) > _PANELS:
        kinds, errors = [""], {name: {"": [*itertools.chain(*found.values())]} for name, found in errors.items()}
    columns = min(4, len(kinds)) or 1
    lines = -(-len(kinds) // columns) or 1
    figure, panels = _figure(3.1 * columns + 0.6, 2.5 * lines + 0.7, lines, columns)
    panels = np.ravel(panels)
    for panel, kind in zip(panels, kinds, strict=False):
        for index, method in enumerate(table.methods):
            if values := errors.get(method, {}).get(kind):
                panel.plot(range(len(values)), values, label=method, **{**_style(index), "markersize": 3})
        panel.set_title(kind or "all layers", fontsize=9)
        _decades(panel)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.suptitle(f"{spec_label(spec)}: relative output error of each layer, block by block", fontsize=10)
    if len(panels):
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(6, len(labels))), fontsize=8)
    return figure


def all_plots(table: ComparisonTable) -> dict[str, bytes]:
    """Every plot as a PNG, by the name of its file; none where no cell has figures."""
    if len(table.failures) == len(table.cells):
        return {}
    figures = {
        "perplexity_by_bits.png": perplexity_by_bits(table),
        "perplexity_by_time.png": perplexity_by_time(table),
    }
    for spec in dict.fromkeys(result.cell.spec for result in table.cells if result.figures is not None):
        name = re.sub(r"\W+", "_", spec_label(spec)).lower()
        figures[f"layer_errors_{name}.png"] = layer_errors(table, spec)
    return {name: png(figure) for name, figure in figures.items()}


def png(figure: Any) -> bytes:
    """The picture of a figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()


def _errors(table: ComparisonTable, method: str, spec: QuantSpec) -> Mapping[str, Sequence[float]]:
    """Kind of layer -> relative errors in the order of the blocks, each the mean over seeds."""
    by_path: dict[str, list[float]] = {}
    for result in table.cells:
        if result.figures is not None and (result.cell.method, result.cell.spec) == (method, spec):
            for layer in result.figures.layers:
                by_path.setdefault(layer.path, []).append(layer.relative_error)
    kinds: dict[str, list[float]] = {}
    for path, values in by_path.items():
        kinds.setdefault(re.sub(r"^layers\.\d+\.|\d+", "", path), []).append(float(np.mean(values)))
    return kinds


def _figure(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Without pyplot, whose figures would stay alive."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=lines * columns > 1, sharey=lines * columns > 1)
    for each in np.ravel(axes):
        each.grid(visible=True, color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index // len(_COLOURS) % len(_MARKERS)],
        "markersize": 6,
    }


def _decades(axes: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, also where it spans less than a factor of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _float_line(axes: Any, table: ComparisonTable) -> None:
    axes.axhline(table.float_figures.perplexity, color="0.4", linestyle=":", label="float")


def _end(axes: Any, table: ComparisonTable, place: Callable[[Row], float]) -> None:
    """Let the axis end where perplexity is of no use, and say above which place what is beyond."""
    limit = _BEYOND * table.float_figures.perplexity
    beyond = [row for row in table.rows() if row.seeds and _mean(row, "perplexity") > limit]
    if not beyond:
        return
    axes.set_ylim(top=limit)
    for row in beyond:
        colour = _style(table.methods.index(row.method))["color"]
        text = f"\u2191 {_mean(row, 'perplexity'):.3g}"
        axes.text(place(row), limit, text, color=colour, fontsize=8, ha="center", va="bottom")


def _seconds(row: Row) -> float:
    """Of quantizing, without those of XLA."""
    return _mean(row, "seconds") - _mean(row, "compile_seconds")


def _mean(row: Row, name: str) -> float:
    return row.values[name].mean
