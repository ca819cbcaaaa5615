"""Arguments and options that commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = (
    "A directory with config.json and *.safetensors or flax_model.msgpack, a .gguf file, a Hub id, or a directory this "
    "tool wrote."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ArchConfigOption = Annotated[
    Path | None,
    typer.Option(
        metavar="config.json",
        help="Of MODEL's architecture, where MODEL is an Orbax checkpoint of parameters or a .msgpack file.",
    ),
]
TensorParallelOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Cut the model over N of this machine's devices, each of which holds its part."),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Run MODEL with these LoRA adapters: of `correct`, or any in PEFT's format."),
]
AsymmetricOption = Annotated[bool, typer.Option("--asymmetric", help="Store a zero point for each group.")]
CalibrationOption = Annotated[
    str,
    typer.Option(
        help="wikitext2, c4, ptb, or a .txt, .jsonl, .json or .parquet file; self: text that MODEL writes, which takes "
        "all of it into memory."
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
LengthOption = Annotated[int | None, typer.Option(min=2, help="Tokens of a window. [2048, or the model's context]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]


class Dtype(StrEnum):
    """Of what stays float."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Order(StrEnum):
    """In which inputs are rounded."""

    natural = "natural"
    activation = "activation"
    group = "group"


class GridName(StrEnum):
    """How scales are fitted."""

    minmax = "minmax"
    mse = "mse"
    ldl = "ldl"


class ExportDtype(StrEnum):
    """Of what an export leaves float."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Parallel(StrEnum):
    """How many devices are run."""

    jit = "jit"
    pmap = "pmap"


class Format(StrEnum):
    """Of an export."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    compressed_tensors = "compressed-tensors"
    float = "float"
    gguf = "gguf"


DtypeOption = Annotated[Dtype, typer.Option(help="Of embeddings, norms, head and activations.")]

CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Run as one of several processes: where the first listens; auto under Slurm, GKE or on TPU pods.",
    ),
]
ProcessIdOption = Annotated[int | None, typer.Option(metavar="I", help="Of this process, from 0.")]
ProcessesOption = Annotated[int | None, typer.Option(metavar="N", help="That take part.")]
ProfileOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write a profile for TensorBoard or XProf there.")
]


def integers(option: str, text: str) -> list[int]:
    """Numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} is no list of integers: give one like 4 or 8,4,3.") from None
