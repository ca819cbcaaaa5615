"""Write a model as other tools read it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from types import MappingProxyType
from typing import Any, NamedTuple

from gptq_jax.models.base import Model, check_no_lora
from gptq_jax.models.fields import DecoderFields
from gptq_jax.storage.directory import check_target
from gptq_jax.storage.export import compressed_tensors, floats, gptq
from gptq_jax.storage.export.base import Options, check_dtype, default_dtype, parse_size, write_directory
from gptq_jax.storage.export.gguf import check_file, write_gguf


class Format(NamedTuple):
    """One format.

    Attributes:
        write: writes a model to a path and returns remarks, as `export` does.
        check: raises OSError, before any work, if nothing can be written to a path.
    """

    write: Callable[[Model, str | PathLike[str], Options], tuple[str, ...]]
    check: Callable[..., None]


def _directory(name: str, plan: Any) -> Format:
    return Format(partial(write_directory, name=name, plan=plan), check_target)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "gptq": _directory("gptq", partial(gptq.plan, version="gptq")),
        "gptq_v2": _directory("gptq_v2", partial(gptq.plan, version="gptq_v2")),
        "compressed-tensors": _directory("compressed-tensors", compressed_tensors.plan),
        "float": _directory("float", floats.plan),
        "gguf": Format(write_gguf, check_file),
    }
)


def export(
    model: Model,
    path: str | PathLike[str],
    *,
    format: str,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, ...]:
    """Write a model in another tool's format: a directory, or for GGUF a file.

    It appears under its name only when all of it is on disk.

    Args:
        model: as `load` or `quantize` gave it.
        path: of the directory, or of the .gguf file.
        format: a name in `FORMATS`. "gptq" (v1) for symmetric grids, "gptq_v2" for any, "compressed-tensors",
            "float" for the dequantized model, "gguf".
        dtype: of what is not quantized: "float16", "bfloat16" or "float32". None: the 16 bits that the parameters
            have, or that the source had, or float16.
        max_shard_size: bytes of tensors in a safetensors file, a number or like "500MB".
        overwrite: replace what an earlier export wrote.
        evaluations: for the model card: dicts as `gptq-jax eval --json` prints them.

    Returns:
        Remarks on what the format holds otherwise than the model, mostly none.

    Raises:
        ValueError: the format cannot hold the model, naming the layers and what to do.
        OSError: see `gptq_jax.storage.directory.check_target`.
    """
    if not isinstance(model, Model):
        raise TypeError("only supplied architectures are exported: other tools know no module of one's own.")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}.")
    check_no_lora(model, "exported")
    if isinstance(model.config, DecoderFields) and model.config.rotated_down:
        raise ValueError(
            f"format={format!r} cannot hold the model, because it rotates inputs as it runs (rotated_down=True), which "
            "other tools do not: save it, or quantize it anew with hadamard_values in place of hadamard_online."
        )
    options = Options(
        dtype=default_dtype(model) if dtype is None else check_dtype(dtype),
        max_shard_size=parse_size(max_shard_size),
        overwrite=overwrite,
        evaluations=evaluations,
    )
    return FORMATS[format].write(model, path, options)
