"""`gptq-jax distill`: a thin command over `distill`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from gptq_jax.commands import calibration_windows, read_calibration, resumable, window
from gptq_jax.options import (
    ArchConfigOption,
    CalibrationOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    SamplesOption,
)


def distill(
    model: ModelArgument,
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="What was made of it by `quantize`, or by another tool.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the calibration.")] = 1,
    rate: Annotated[float, typer.Option(help="Of learning the logarithm of scales, at the first step.")] = 2e-3,
    calibration: CalibrationOption = "wikitext2",
    samples: SamplesOption = 256,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows' places.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that MODEL writes at a time.")] = 8,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory this tool wrote.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the steps that an interrupted run left, and begin anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the scales of QUANTIZED, all layers at once, to predict what MODEL does, and write it with these.

    The same size, and what 2 and 3 bits lost is made up for in good part. Both models are in memory; a window takes
    about as long as eight forward passes. Interrupted or killed, the same command goes on, a minute back at most.
    """
    from gptq_jax.calibration import batches
    from gptq_jax.distillation.end_to_end import check_models, noted
    from gptq_jax.distillation.end_to_end import distill as run
    from gptq_jax.models.identity import digest_arrays
    from gptq_jax.report import Report
    from gptq_jax.storage.directory import check_target
    from gptq_jax.storage.load import load
    from gptq_jax.storage.store import save
    from gptq_jax.terminal import console, count_progress, escape, note
    from gptq_jax.tuning import block_tuning

    check_target(out, overwrite=overwrite)
    tuning = block_tuning(epochs=epochs, rate=rate)
    text = read_calibration(calibration)
    with console.status(f"loading {escape(model)} and {escape(quantized)}"):
        loaded = load(model, dtype=str(dtype), arch_config=arch_config)
        packed = load(quantized, dtype=str(dtype))
    check_models(loaded, packed)
    length = window(length, loaded.config.context_length)
    how: dict[str, int] = {"samples": samples, "length": length, "seed": seed}
    windows = calibration_windows(text, loaded, model, dtype, arch_config, batch_size=batch_size, **how)
    told = {
        "model": loaded.identity(),
        "quantized": packed.identity(),
        "calibration": digest_arrays([windows]),
        "settings": {"epochs": epochs, "rate": rate},
    }
    with (
        resumable(out, "distilling", told, steps="steps", restart=restart) as progress,
        count_progress("distilling") as show,
    ):
        trained, found = run(loaded, packed, batches(windows, 1), tuning=tuning, progress=progress, on_step=show)
    if trained.report is not None:
        trained = replace(trained, report=noted(Report.from_json(trained.report), found).to_json())
    save(trained, out, overwrite=overwrite)
    progress.discard()
    if found.after == found.before:
        note(f"KL divergence to the float model: {found.before:.4f}, which training did not lessen: the scales stay")
    else:
        note(f"KL divergence to the float model, on windows held back: {found.before:.4f}, now {found.after:.4f}")
    note(f"wrote {out}")
    if as_json:
        print(json.dumps({**asdict(found), **how, "epochs": epochs, "rate": rate}))
