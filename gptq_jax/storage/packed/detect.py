"""Which packed format a directory is in: what its config.json, quantize_config.json or quant_config.json says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_jax.storage.base import CheckpointError, TensorSource
from gptq_jax.storage.fields import shown
from gptq_jax.storage.hf_directory import read_json
from gptq_jax.storage.packed import awq, compressed_tensors_config, gptq_config
from gptq_jax.storage.packed.base import PackedFormat
from gptq_jax.storage.safetensors import SafetensorsDirectory

PACKED_KEYS = ("quantization_config", "compression_config")  # of config.json
FORMATS: Mapping[str, Callable[[Mapping[str, Any], Path, str], PackedFormat]] = {
    "gptq": gptq_config.parse,
    "awq": awq.parse,
    "compressed-tensors": compressed_tensors_config.parse,
}
# Files beside config.json, and the method where they name none.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Fields that two configs of one directory must agree on.
_DECISIVE = ("quant_method", "bits", "group_size", "sym", "checkpoint_format")


@dataclass(frozen=True)
class PackedCheckpoint:
    """A directory and the packed format it is in."""

    source: SafetensorsDirectory
    format: PackedFormat


def packed_format(source: TensorSource) -> PackedCheckpoint | None:
    """The packed format of a checkpoint; None if its weights are float.

    Raises:
        CheckpointError: a config names a format or a setting that cannot be read, or two contradict each other.
    """
    if not isinstance(source, SafetensorsDirectory):
        return None
    found: list[tuple[Path, str, dict[str, Any]]] = []
    for key in PACKED_KEYS:
        if (config := source.config.get(key)) is not None:
            found.append((source.path / "config.json", f"{key}.", config))
    for name in _OWN_FILES:
        if (source.path / name).is_file():
            found.append((source.path / name, "", read_json(source.path / name)))
    for file, where, config in found:
        if not isinstance(config, dict):
            raise CheckpointError(file, f"{where.rstrip('.') or 'the file'} is {shown(config)}, not an object.")
    if not found:
        return None
    _check_agreement(found)
    file, where, config = found[0]
    # What one leaves out the other may say.
    merged = {key: value for _, _, other in reversed(found) for key, value in other.items()}
    method = _method(file, where, merged)
    return PackedCheckpoint(source, FORMATS[method](merged, file, where))


def _check_agreement(found: list[tuple[Path, str, dict[str, Any]]]) -> None:
    (first, where, config), *others = found
    for file, its_where, other in others:
        for name in _DECISIVE:
            one, two = config.get(name), other.get(name)
            if one is not None and two is not None and one != two:
                raise CheckpointError(
                    first,
                    f"{where}{name} is {shown(one)}, but {file.name} has {its_where}{name} {shown(two)}: "
                    "correct the one that is wrong.",
                )


def _method(file: Path, where: str, config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if method is None:
        if "config_groups" in config:
            return "compressed-tensors"
        method = config.get("method") or _OWN_FILES.get(file.name)
        method = "gptq" if method is None and "bits" in config and "desc_act" in config else method
    name = str(method).lower().replace("_", "-")
    if name not in FORMATS:
        raise CheckpointError(
            file, f"{where}quant_method is {shown(method)}, which cannot be read: {', '.join(FORMATS)} can."
        )
    return name
