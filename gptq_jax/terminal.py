"""What commands show: progress and tables on stderr, so that stdout holds only what was asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gptq_jax.report import LayerReport, Report, expert_lines, spec_label

__all__ = [
    "console",
    "count_progress",
    "escape",
    "layer_progress",
    "note",
    "seconds_table",
    "size",
    "steps_progress",
    "summarize",
]

console = Console(stderr=True)


def note(text: str) -> None:
    """A line as it is: no markup, and never broken, so that a path in it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def layer_progress() -> Iterator[Callable[[LayerReport, int, int], None]]:
    """A bar with the time left, the last layer and the running loss; yields what `quantize(on_layer=)` takes."""
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.description}"),
    )
    running = 0.0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def update(layer: LayerReport, done: int, total: int) -> None:
            nonlocal running
            running += layer.loss
            shown = f"loss {running:.4g}  {layer.path}"
            progress.update(task, completed=done, total=total, description=shown)
            if layer.fell_back:
                console.print(f"[red]{layer.path} could not be solved and was rounded to nearest.")

        yield update


@contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; yields what takes how many are done, and how many there are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(title), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def steps_progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over `total` steps; yields what takes the step at hand, and how many are done with it."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, advance=done, description=escape(text))


def summarize(report: Report, *, every_layer: bool = True) -> None:
    """Print the table of layers, what stayed float, fallbacks, and where the time went."""
    if every_layer:
        console.print(report.table())
    kept: dict[str, list[str]] = {}
    for path, reason in report.kept_float.items():
        kept.setdefault(reason, []).append(path)
    for reason, paths in kept.items():
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        console.print(f"left float ({reason}): {shown}")
    if report.fallbacks:
        console.print(f"[bold red]rounded to nearest after all: {', '.join(report.fallbacks)}")
    for line in expert_lines(report.to_json()["layers"]):
        note(line)
    asked = report.settings.get("damping", 1.0)
    raised = [layer.path for layer in report.layers if not layer.fell_back and (layer.damping or 0) > asked * 1.001]
    if raised:
        console.print(f"[yellow]damping was raised for {', '.join(raised)}")
    if (tuned := report.tuned) is not None:
        console.print(f"tuning took the blocks' mean relative error from {tuned.before:.4f} to {tuned.after:.4f}")
    labels = sorted({spec_label(layer.spec) for layer in report.layers})
    console.print(f"{', '.join(labels)}: {report.bits_per_weight:.3f} bits per weight in {len(report.layers)} layers")
    console.print(seconds_table(report.seconds))


def seconds_table(seconds: dict[str, float]) -> Table:
    """Stages, their time and its share."""
    table = Table(title="wall time", title_justify="left")
    for name in ("stage", "seconds", "share"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    total = sum(seconds.values())
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.1f}", f"{spent / total:.0%}" if total else "")
    return table


def size(nbytes: float) -> str:
    """Bytes in MB, a million each."""
    return f"{nbytes / 1e6:.1f} MB"
