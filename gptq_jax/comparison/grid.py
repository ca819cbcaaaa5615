"""The grid of runs: every method, at every grid of weights, on every draw of calibration; one cell after another."""

import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax

import gptq_jax.terminal as terminal
from gptq_jax.comparison.cells import Cell, CellResult, Figures, layer_errors
from gptq_jax.comparison.inputs import Inputs, Text, cut_inputs
from gptq_jax.comparison.measuring import measured
from gptq_jax.comparison.store import ComparisonDirectory, FloatFigures
from gptq_jax.comparison.table import ComparisonTable
from gptq_jax.evaluate import Reference, compare, perplexity
from gptq_jax.methods import Method
from gptq_jax.models.adapted import AdaptedModel
from gptq_jax.models.base import Model
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import QUANTIZED, check_weights, is_quantized, quantize
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.manifest import digest
from gptq_jax.storage.store import tree_bytes


def compare_methods(
    model: Model | AdaptedModel,
    methods: Mapping[str, Method] | Sequence[Method],
    specs: Sequence[QuantSpec],
    calibration: Text,
    held_out: Text,
    *,
    seeds: Sequence[int] = (0,),
    samples: int = 128,
    length: int | None = None,
    batch_size: int = 8,
    eval_length: int | None = None,
    eval_windows: int | None = None,
    eval_batch_size: int = 1,
    devices: int | Sequence[jax.Device] | None = None,
    out: str | os.PathLike[str] | None = None,
    keep_bytes: int = 2**30,
    progress: bool = False,
) -> ComparisonTable:
    """Quantize a model by every method at every grid, and measure each result against the float model.

    A cell that fails does not stop the others: its row says why.

    Args:
        model: float; it stays as it is.
        methods: by the names that the table shows; a sequence goes by the methods' own names.
        specs: grids of weights.
        calibration: a text, which needs the model's tokenizer, or its tokens [time]; "self": text that the model
            writes, for each seed its own.
        held_out: the same, to measure perplexity and divergence on.
        seeds: of the calibration windows' places; rows tell the mean over them, and the spread.
        samples: calibration windows.
        length: tokens of one; None: 2048, or the model's context if that is shorter.
        batch_size: calibration windows at a time.
        eval_length: tokens of a held-out window; None: as `length`.
        eval_windows: at most so many of them; None: all of the text.
        eval_batch_size: held-out windows at a time on each device.
        devices: that evaluate, as for `perplexity`.
        out: a directory to keep each finished cell in, so that the same call goes on after a crash; more methods, grids
            and seeds may be added to it. None: keep nothing.
        keep_bytes: of the float model's states for the held-out text, at most, that are kept and not computed anew for
            each cell.
        progress: show it on the terminal's error stream.

    Returns:
        All cells of `out`, or of this call.

    Raises:
        ValueError: before any cell is run: an argument that cannot be used, a model that is quantized already, or an
            `out` that holds a comparison with other settings, each of which is named.
    """
    named, grids = _named(methods), _grids(specs)
    if is_quantized(model):
        raise ValueError(QUANTIZED)
    check_weights(model)
    inputs = cut_inputs(
        model,
        calibration,
        held_out,
        seeds=seeds,
        samples=samples,
        length=length,
        batch_size=batch_size,
        eval_length=eval_length,
        eval_windows=eval_windows,
        progress=progress,
    )
    evaluation: dict[str, Any] = {"length": inputs.eval_length, "batch_size": eval_batch_size, "devices": devices}
    settings = {**_setting(model), **inputs.settings, "eval_batch_size": eval_batch_size}
    directory = None if out is None else ComparisonDirectory(Path(out))
    results: dict[Cell, CellResult] = {}
    if directory is not None:
        directory.begin(settings)
        results = directory.results()
    makings = {name: _making(method) for name, method in named.items()}
    _check_makings(makings, results)

    cells = [Cell(name, spec, seed) for seed, spec, name in itertools.product(seeds, grids, named)]
    left = [cell for cell in cells if cell not in results or results[cell].figures is None]
    reference = Reference(model, keep_bytes=keep_bytes)
    figures = None if directory is None else directory.float_figures()
    with terminal.steps_progress("comparing", len(cells) + 1) if progress else nullcontext(_silent) as step:
        step("float model", len(cells) - len(left))
        if figures is None:
            found = perplexity(reference, inputs.held_out, **evaluation)
            figures = FloatFigures(perplexity=found, nbytes=tree_bytes(model.params))
            if directory is not None:
                directory.put_float(figures)
        step("", 1)
        for cell in left:
            step(cell.label, 0)
            result = _run(cell, named[cell.method], makings[cell.method], reference, inputs, evaluation)
            results[cell] = result
            if directory is not None:
                directory.put(result)
            if progress:
                terminal.note(_line(result))
            step(cell.label, 1)
    return ComparisonTable.of(figures, results.values(), settings, order=tuple(named))


def _run(
    cell: Cell,
    method: Method,
    making: Mapping[str, Any],
    reference: Reference,
    inputs: Inputs,
    evaluation: Mapping[str, Any],
) -> CellResult:
    try:
        with measured() as quantizing:
            packed, report = quantize(reference.model, inputs.calibration[cell.seed], cell.spec, method)
        nbytes = tree_bytes(packed.params)
        with measured() as evaluating:
            found = compare(_prepared(packed), reference, inputs.held_out, **evaluation)
    except Exception as error:  # whatever a method does wrong is its row's, and not the others'
        return CellResult(cell=cell, method=making, figures=None, failed=_reason(error))
    figures = Figures(
        perplexity=found.perplexity,
        kl=found.kl,
        top1_agreement=found.top1_agreement,
        bits_per_weight=report.bits_per_weight,
        nbytes=nbytes,
        seconds=quantizing.seconds,
        compile_seconds=quantizing.compile_seconds,
        evaluation_seconds=evaluating.seconds,
        peak_bytes=quantizing.peak_bytes,
        layers=layer_errors(report),
        fallbacks=report.fallbacks,
    )
    return CellResult(cell=cell, method=making, figures=figures)


def _prepared(model: Model | AdaptedModel) -> Model | AdaptedModel:
    """As it runs here; a module of one's own runs as it is."""
    return prepare(model) if isinstance(model, Model) else model


def _named(methods: Mapping[str, Method] | Sequence[Method]) -> dict[str, Method]:
    pairs = list(methods.items() if isinstance(methods, Mapping) else ((method.name, method) for method in methods))
    names = [name for name, _ in pairs]
    if not names:
        raise ValueError("methods is empty: give at least one.")
    for name, method in pairs:
        if not isinstance(method, Method):
            raise ValueError(f"methods: {name!r} is {type(method).__name__}, but must be a gptq_jax.Method.")
        if not name:
            raise ValueError("methods: one has no name; give a dict of names and methods.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"methods: two are called {twice[0]!r}; give a dict of names and methods.")
    return dict(pairs)


def _grids(specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"specs={list(specs)} must be at least one, and none twice.")
    return list(specs)


def _setting(model: Model | AdaptedModel) -> dict[str, Any]:
    """What, beside the tokens, figures depend on."""
    from gptq_jax import __version__

    return {
        "model": model.identity(),
        "versions": {"gptq_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }


def _making(method: Method) -> dict[str, Any]:
    """What tells a method from another of its name: its settings and, if it is the user's own, the file of its code."""
    package = Path(__file__).parents[1]
    try:
        file = inspect.getsourcefile(inspect.unwrap(method.solve))
        source = None if file is None or package in Path(file).parents else digest(Path(file))
    except (TypeError, OSError):  # a callable without code of its own, or code that was typed in
        source = None
    return {"name": method.name, "settings": method.all_settings, "source": source}


def _check_makings(makings: Mapping[str, Mapping[str, Any]], results: Mapping[Cell, CellResult]) -> None:
    for cell, result in results.items():
        now = makings.get(cell.method)
        if now is None or result.figures is None:
            continue
        for part, value in now.items():
            if (before := result.method.get(part)) != value:
                what = "has other code" if part == "source" else f"has {part} {before} there, {value} here"
                raise ValueError(
                    f"the comparison holds cells of a method {cell.method!r} that {what}: "
                    "give the method another name, or choose another directory."
                )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _line(result: CellResult) -> str:
    figures = result.figures
    if figures is None:
        return f"{result.cell.label}: failed: {result.failed}"
    return f"{result.cell.label}: perplexity {figures.perplexity:.4g}, KL {figures.kl:.4g}, {figures.seconds:.1f} s"


def _silent(text: str, done: int) -> None:
    pass
