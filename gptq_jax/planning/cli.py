"""`gptq-jax plan`: a thin command over the functions of this package."""

import json
from typing import Annotated

import typer

from gptq_jax.options import MODEL_HELP, Dtype, DtypeOption, JsonOption, SamplesOption, integers


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|SHAPE", help=f"{MODEL_HELP} Or a name like llama-2-70b.")],
    bits: Annotated[str, typer.Option(help="2, 3, 4 or 8; several separated by commas.")] = "8,4,3,2",
    group_size: Annotated[str, typer.Option(help="Inputs that share a scale; -1: the whole column.")] = "128",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With a zero point for each group.")] = False,
    samples: SamplesOption = 128,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window, and of a text to generate. [2048, or the context]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration windows at a time.")] = 8,
    sequences: Annotated[int, typer.Option(min=1, help="Texts generated at a time.")] = 1,
    device_memory: Annotated[
        str | None, typer.Option(help="Of one device, like 24GB: how many of them are needed.")
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="First measure this device, and keep what was found for all plans to come."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What quantizing and running MODEL would take: disk, memory, devices, time. Only its config is read."""
    from gptq_jax.planning.architecture import find_architecture
    from gptq_jax.planning.plan import plan as make_plan
    from gptq_jax.planning.profile import measure_profile, profile_path, write_profile
    from gptq_jax.planning.tables import plan_lines, plan_table
    from gptq_jax.spec import QuantSpec
    from gptq_jax.storage.export.base import parse_size
    from gptq_jax.terminal import console, escape, note

    grids = [
        QuantSpec(bits=width, group_size=size, symmetric=not asymmetric)
        for width in integers("--bits", bits)
        for size in integers("--group-size", group_size)
    ]
    nbytes = None if device_memory is None else parse_size(device_memory)
    find_architecture(model)  # before anything is measured
    if measure:
        with console.status("measuring this device"):
            write_profile(measure_profile(), profile_path())
        note(f"wrote {profile_path()}")
    with console.status(f"planning {escape(model)}"):
        found = make_plan(
            model,
            grids,
            dtype=str(dtype),
            samples=samples,
            length=length,
            batch_size=batch_size,
            sequences=sequences,
            device_memory=nbytes,
        )
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    print(f"{model}: {found.parameters:,} parameters in {found.layers} blocks")
    Console().print(plan_table(found))
    for line in plan_lines(found):
        print(line)
