"""What every export to a directory shares: tensors by Hugging Face's names, shards, config, tokenizer, card."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from gptq_jax.models.base import Model
from gptq_jax.models.experts import EXPERT
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.directory import EXPORT_MARK, check_target, replacing, write_json
from gptq_jax.storage.export.card import card
from gptq_jax.storage.safetensors import INDEX, SINGLE
from gptq_jax.tensor import QuantizedTensor, experts_of

DTYPES = ("float16", "bfloat16", "float32")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Named = tuple[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an export is written.

    Attributes:
        dtype: of what is not quantized: "float16", "bfloat16" or "float32".
        max_shard_size: bytes of tensors in a file.
        overwrite: replace what an earlier export wrote.
        evaluations: for the model card, each as `gptq-jax eval --json` prints it.
    """

    dtype: str
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    evaluations: Sequence[Mapping[str, Any]] = ()


class Plan(NamedTuple):
    """What a format makes of a model, checked but not yet computed.

    Attributes:
        tensors: yields every tensor by its name; called once, when writing begins.
        quantization: becomes `quantization_config` of config.json, or None.
        nbytes: about how much will be written.
        files: more JSON files by name.
    """

    tensors: Callable[[], Iterator[Named]]
    quantization: dict[str, Any] | None
    nbytes: int
    files: dict[str, Any] = {}  # noqa: RUF012  (never changed)


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A model's arrays by Hugging Face's names.

    Attributes:
        packed: module, like "model.layers.0.mlp.down_proj" -> its weight.
        floats: tensor -> its array (of JAX or numpy), and whether the checkpoint has it transposed.
        float_linears: modules of blocks whose weight is not packed.
    """

    packed: dict[str, QuantizedTensor] = field(default_factory=dict)
    floats: dict[str, tuple[Any, bool]] = field(default_factory=dict)
    float_linears: tuple[str, ...] = ()

    @property
    def float_count(self) -> int:
        """Values in all float tensors."""
        return sum(leaf.size for leaf, _ in self.floats.values())

    def float_tensors(self, dtype: str) -> Iterator[Named]:
        """Every float tensor as it is stored; ValueError where `dtype` cannot hold its values."""
        for name, (leaf, transposed) in self.floats.items():
            yield name, as_dtype(name, leaf.T if transposed else leaf, dtype)


def modules(model: Model) -> Modules:
    """Sort a model's arrays; stacked ones of experts are taken apart.

    Raises:
        ValueError: a packed weight is not one matrix, nor one of each expert.
    """
    found, linears = Modules(), []
    leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    for path, leaf in leaves:
        keys = tuple(entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key for entry in path)
        name, transposed = model.config.tensor_name(keys)
        for tensor, part in _parts(name, leaf):
            if isinstance(part, QuantizedTensor):
                if len(part.shape) != 2:
                    raise ValueError(f"{tensor} has shape {part.shape}: only matrices can be exported.")
                found.packed[tensor.removesuffix(".weight")] = part
            else:
                found.floats[tensor] = (part, transposed)
                if keys[0] == "layers" and keys[-1] == "kernel":
                    linears.append(tensor.removesuffix(".weight"))
    return Modules(packed=found.packed, floats=found.floats, float_linears=tuple(linears))


def _parts(name: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """What is stored of a leaf, by name: itself, or each expert's part of it."""
    if EXPERT not in name:
        yield name, leaf
        return
    parts = experts_of(leaf) if isinstance(leaf, QuantizedTensor) else np.asarray(leaf)
    for expert, part in enumerate(parts):
        yield name.replace(EXPERT, str(expert)), part


def as_dtype(name: str, values: Any, dtype: str) -> Shaped[np.ndarray, "..."]:
    """`values` as a contiguous array of `dtype`; ValueError if they are beyond it."""
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=jnp.dtype(dtype))
    if not np.isfinite(cast).all():
        raise ValueError(f"{name} reaches {float(np.abs(values).max()):.3g}, beyond {dtype}: export in bfloat16.")
    return cast


def encode_all(
    packed: Mapping[str, QuantizedTensor], encode: Callable[[QuantizedTensor], dict[str, np.ndarray]]
) -> Callable[[], Iterator[Named]]:
    """The tensors of all packed modules, made one module at a time; what cannot be encoded is told at once.

    Raises:
        ValueError: naming every module that the format cannot hold.
    """
    problems = []
    for name, tensor in packed.items():
        try:
            encode(tensor)
        except ValueError as error:
            problems.append(f"{name}: {str(error).rstrip('.')}")
    refuse(problems)

    def tensors() -> Iterator[Named]:
        for name, tensor in packed.items():
            for suffix, values in encode(tensor).items():
                yield f"{name}.{suffix}", values

    return tensors


def refuse(problems: list[str]) -> None:
    """Raise one ValueError of all problems, if there are any."""
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"this format cannot hold the model: {shown}.")


def most_common_spec(packed: Mapping[str, QuantizedTensor]) -> QuantSpec:
    """The grid of most modules, without its dtype of scales."""
    if not packed:
        raise ValueError("the model is not quantized: quantize it first, or export it with --format float.")
    return Counter(grid_of(tensor) for tensor in packed.values()).most_common(1)[0][0]


def grid_of(tensor: QuantizedTensor) -> QuantSpec:
    """A tensor's spec without its dtype of scales; a group as long as the column is the column."""
    spec = tensor.spec
    return QuantSpec(bits=spec.bits, group_size=spec.group_size, symmetric=spec.symmetric)


def packed_bytes(found: Modules, dtype: str) -> int:
    """About how many bytes a packed export takes."""
    floats = found.float_count * jnp.dtype(dtype).itemsize
    return floats + sum(tensor.nbytes + 4 * tensor.d_in for tensor in found.packed.values())


def write_directory(
    model: Model,
    path: str | PathLike[str],
    options: Options,
    *,
    name: str,
    plan: Callable[[Model, str], Plan],
) -> tuple[str, ...]:
    """Write what `plan` makes of a model to a directory that appears under its name only when it is whole.

    Args:
        model: float or quantized.
        path: of the directory.
        options: see there.
        name: of the format.
        plan: called with the model and the dtype.

    Returns:
        Remarks on what the directory holds otherwise than the model: none, all is exact but for `options.dtype`.

    Raises:
        ValueError: the format cannot hold the model.
        OSError: see `check_target`.
    """
    path = Path(path).absolute()
    check_target(path, overwrite=options.overwrite)
    planned = plan(model, options.dtype)
    check_target(path, overwrite=options.overwrite, nbytes=planned.nbytes)
    with replacing(path) as partial:
        write_shards(partial, planned.tensors(), options.max_shard_size)
        write_json(partial / "config.json", hf_config(model, options.dtype, planned.quantization))
        for file, content in planned.files.items():
            write_json(partial / file, content)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card(model.report, name, path.name, options.evaluations))
        write_json(partial / EXPORT_MARK, {"format": name, "gptq_jax": version("gptq-jax")})
    return ()


def write_shards(folder: Path, tensors: Iterable[Named], limit: int) -> None:
    """Write safetensors files of at most `limit` bytes of tensors each, and an index if there are several.

    A tensor larger than that has a file of its own. One file's tensors are in memory at a time.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    total = size = 0
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = folder / f"{len(shards)}.part"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library's are private
        shards.append(list(held))
        held.clear()

    for name, values in tensors:
        if held and size + values.nbytes > limit:
            flush()
            size = 0
        held[name] = values
        size += values.nbytes
        total += values.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def hf_config(model: Model, dtype: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json: the source's, with what the export changes."""
    config = {key: value for key, value in model.source.items() if key not in ("quantization_config", "dtype")}
    # transformers 5 calls it dtype, and older readers torch_dtype; it reads either.
    config["torch_dtype"] = dtype
    return config if quantization is None else {**config, "quantization_config": quantization}


def default_dtype(model: Model) -> str:
    """16 bits: of the parameters where they have so many, else as the source's config says, else float16."""
    leaf = next(leaf for leaf, _ in modules(model).floats.values())
    for found in (str(leaf.dtype), model.source.get("dtype"), model.source.get("torch_dtype")):
        if found in ("float16", "bfloat16"):
            return str(found)
    return "float16"


def check_dtype(dtype: str) -> str:
    """`dtype`, or ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use {', '.join(DTYPES)}.")
    return dtype


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MiB" or a number; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    nbytes = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if nbytes < 1:
        raise ValueError(f"{size!r} is no size: give one like 5GB or 500MB.")
    return nbytes


def read_evaluations(paths: Iterable[str | PathLike[str]]) -> list[dict[str, Any]]:
    """Files that `gptq-jax eval --json` printed; ValueError for any other."""
    found = []
    for path in paths:
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(data, dict) or not isinstance(data.get("perplexity"), float):
            raise ValueError(f"{path} holds no perplexity: give what `gptq-jax eval --json` prints.")
        found.append(data)
    return found
