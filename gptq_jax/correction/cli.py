"""`gptq-jax correct`: a thin command over `eora`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptq_jax.commands import calibration_windows, open_float, read_calibration, resumable, window
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


def correct(
    model: ModelArgument,
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="What was made of it by `quantize`, or by another tool.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the factors: rank x (inputs + outputs) numbers a layer.")] = 16,
    targets: Annotated[str, typer.Option(metavar="REGEX", help="Only layers whose path it is found in. [all]")] = "",
    alpha: Annotated[
        float, typer.Option(help="Bring layers towards QEP's weights, not the float ones; 0.5 for a model of qep.")
    ] = 0.0,
    calibration: CalibrationOption = "wikitext2",
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows' places.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
    devices: Annotated[int | None, typer.Option(metavar="N", help="Share the work among N devices. [all]")] = None,
    activations: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the calibration between blocks in a file there. [in memory]"),
    ] = None,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory this tool wrote.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the blocks that an interrupted run left, and begin anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make up for what quantizing lost by low-rank factors beside the packed weights (EoRA), and write these.

    They are float16 LoRA adapters in PEFT's format: run QUANTIZED with `--adapter`. Takes about as long as quantizing;
    interrupted or killed, the same command goes on after the last block that is kept. What was rotated before
    (`--method hadamard+...`) is compared with MODEL rotated alike, in memory.
    """
    from gptq_jax.calibration import batches
    from gptq_jax.correction.low_rank import CorrectedLayer, bits_per_weight, corrected_layers, eora, stacked_experts
    from gptq_jax.models.identity import digest_arrays
    from gptq_jax.rewrites.hadamard import recorded
    from gptq_jax.spec import SpecRules
    from gptq_jax.storage.directory import check_target
    from gptq_jax.storage.load import load
    from gptq_jax.storage.peft import save_lora
    from gptq_jax.terminal import console, count_progress, escape, note

    check_target(out, overwrite=overwrite)
    text = read_calibration(calibration)
    with console.status(f"loading {escape(quantized)}"):
        packed = load(quantized, dtype=str(dtype))
    rotation = recorded((packed.report or {}).get("settings", {}))
    source = open_float(model, dtype, arch_config, whole=rotation is not None)
    if rotation is not None:
        source = rotation.apply(source, [], SpecRules())
    corrected_layers(source, packed, rank, targets)  # before anything takes long
    length = window(length, source.config.context_length)
    how: dict[str, int] = {"samples": samples, "length": length, "seed": seed}
    windows = calibration_windows(text, source, model, dtype, arch_config, batch_size=batch_size, **how)
    told = {
        "model": source.identity(),
        "quantized": packed.identity(),
        "calibration": digest_arrays([windows]),
        "settings": {"rank": rank, "targets": targets, "alpha": alpha, "batch_size": batch_size},
    }
    layers: list[CorrectedLayer] = []
    with (
        resumable(out, "correcting", told, steps="blocks", restart=restart) as progress,
        count_progress("correcting") as show,
    ):

        def on_layer(layer: CorrectedLayer, done: int, total: int) -> None:
            layers.append(layer)
            show(done, total)

        adapters = eora(
            source,
            packed,
            batches(windows, batch_size),
            rank,
            targets=targets,
            alpha=alpha,
            devices=devices,
            activations=activations,
            progress=progress,
            on_layer=on_layer,
        )
    save_lora(adapters, packed, out, overwrite=overwrite)
    progress.discard()
    before, after = bits_per_weight(packed, adapters)
    if stacked := stacked_experts(packed):
        note(f"left as they are, for stacked experts have no adapters: {', '.join(stacked)}")
    errors = [sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("error", "corrected_error")]
    note(f"mean error of {len(layers)} layers: {errors[0]:.4f}, corrected {errors[1]:.4f}")
    note(f"bits per weight: {before:.3f}, with the factors {after:.3f}")
    note(f"wrote {out}")
    if as_json:
        found = {"rank": rank, "bits_per_weight": before, "corrected_bits_per_weight": after}
        print(json.dumps({**found, "layers": [asdict(layer) for layer in layers]}))
