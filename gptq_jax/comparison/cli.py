"""`gptq-jax compare`: a thin command over `compare_methods`."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gptq_jax.commands import read_calibration
from gptq_jax.options import (
    ArchConfigOption,
    AsymmetricOption,
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    SamplesOption,
    integers,
)


def compare(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The directory of the comparison; one begun there is gone on with.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas, each as for `quantize --method`; also distill+METHOD and eora+METHOD, which go "
            "on as the commands distill and correct do."
        ),
    ] = "rtn,gptq",
    bits: Annotated[str, typer.Option(help="2, 3, 4 or 8, separated by commas.")] = "4,3",
    group_size: Annotated[
        str, typer.Option(help="Inputs that share a scale, separated by commas; -1: the whole column.")
    ] = "128",
    asymmetric: AsymmetricOption = False,
    calibration: CalibrationOption = "wikitext2",
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seeds: Annotated[str, typer.Option(help="Of the windows' places, separated by commas.")] = "0",
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration windows at a time.")] = 8,
    text: Annotated[str | None, typer.Option(help="Held-out text: a .txt, .jsonl, .json or .parquet file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Or wikitext2, c4 or ptb.")] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "test",
    eval_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a held-out window. [as --length]")] = None,
    eval_windows: Annotated[
        int | None, typer.Option(min=1, help="At most so many held-out windows. [all of the text]")
    ] = None,
    eval_batch_size: Annotated[int, typer.Option(min=1, help="Held-out windows at a time on each device.")] = 1,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="Share held-out windows among N of this machine's devices. [all]")
    ] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Tables only; needs no matplotlib.")] = False,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL by several methods at several grids, and report how each does.

    The same command goes on where it was stopped. A run that fails does not stop the others; the exit status is 1 then.
    """
    from gptq_jax.by_name import make_method
    from gptq_jax.calibration import read_text
    from gptq_jax.comparison import compare_methods, write_report
    from gptq_jax.comparison.plots import check_matplotlib
    from gptq_jax.self_calibration import SELF
    from gptq_jax.spec import QuantSpec
    from gptq_jax.storage.load import load
    from gptq_jax.terminal import console, escape, note

    source = text or dataset
    if (text is None) == (dataset is None) or source is None:
        raise ValueError("give either --text FILE or --dataset NAME, the held-out text.")
    names = methods.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"--methods {methods!r} names one twice.")
    chosen = {name: make_method(name, {}) for name in names}
    pairs = itertools.product(integers("--bits", bits), integers("--group-size", group_size))
    specs = [QuantSpec(bits=width, group_size=size, symmetric=not asymmetric) for width, size in pairs]
    draws = integers("--seeds", seeds)
    if not no_plots:
        check_matplotlib()
    with console.status(f"reading {escape(source)}"):
        held_out = read_text(source, split=split)
    fit = read_calibration(calibration) or SELF
    with console.status(f"loading {escape(model)}"):
        loaded = load(model, dtype=str(dtype), arch_config=arch_config)
    table = compare_methods(
        loaded,
        chosen,
        specs,
        fit,
        held_out,
        seeds=draws,
        samples=samples,
        length=length,
        batch_size=batch_size,
        eval_length=eval_length,
        eval_windows=eval_windows,
        eval_batch_size=eval_batch_size,
        devices=devices,
        out=out,
        progress=True,
    )
    titles = {"model": Path(model).name, "calibration": Path(calibration).name, "held_out": Path(source).name}
    table = replace(table, names=titles)
    write_report(table, out, plots=not no_plots)
    note(f"wrote {out / 'report.html'}")
    if as_json:
        print(json.dumps(table.to_json()))
    else:
        print(table.markdown(), end="")
    if table.failures:
        note(f"{len(table.failures)} of {len(table.cells)} runs failed; the same command tries them again.")
        raise typer.Exit(1)
