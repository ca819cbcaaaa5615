"""GGUF files: packed weights in blocks of 32 where the grid allows, everything else in float."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from gptq_jax.models.base import Model
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.storage.directory import check_parent, sync
from gptq_jax.storage.export.base import Modules, Options, as_dtype, modules, refuse
from gptq_jax.storage.export.gguf_blocks import BlockType, block_type, encode
from gptq_jax.storage.export.gguf_metadata import llama_metadata
from gptq_jax.storage.export.gguf_tokenizer import tokenizer_metadata
from gptq_jax.storage.gguf_config import DIVISORS
from gptq_jax.storage.gguf_families import BLOCK, OUTER
from gptq_jax.storage.gguf_header import MAGIC

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Entry(NamedTuple):
    """A tensor to write: its GGUF name, shape, type, and what makes its bytes or floats."""

    name: str
    shape: tuple[int, ...]
    type: str
    values: Callable[[], Shaped[np.ndarray, "..."]]


def write_gguf(model: Model, path: str | PathLike[str], options: Options) -> tuple[str, ...]:
    """Write one .gguf file that appears under its name only when it is whole.

    Packed weights become Q4_0 (symmetric, 2 to 4 bits), Q4_1 (asymmetric) or Q8_0 (symmetric 8 bits), with the
    same codes and scales; matrices that are not packed have `options.dtype`, vectors float32.

    Args:
        model: a Llama or Mistral model, float or quantized.
        path: of the file, ending in .gguf.
        options: see there; GGUF has no shards and no card.

    Returns:
        Remarks on what the file holds otherwise than the model.

    Raises:
        ValueError: naming every layer whose grid has no counterpart, or the part of the model that has none.
        OSError: the file exists, or cannot be written.
    """
    path = Path(path).absolute()
    check_file(path, overwrite=options.overwrite)
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(f"{type(model.config).__name__} has no counterpart in GGUF.")
    if model.config.experts is not None:
        raise ValueError("models with experts cannot be written as GGUF: use --format gptq or compressed-tensors.")
    found = modules(model)
    remarks = _remarks(found, types := _block_types(found))
    metadata, divisors = llama_metadata(model.config)
    if model.tokenizer is None:
        remarks += ("there is no tokenizer, without which llama.cpp loads nothing",)
    else:
        metadata |= tokenizer_metadata(
            model.tokenizer, vocab_size=model.config.vocab_size, context_length=model.config.context_length
        )
        metadata |= _end_of_turn(model, metadata)
    entries = list(_entries(found, types, model.config, divisors, options.dtype))
    check_parent(path, sum(_nbytes(entry) for entry in entries))
    with _replacing_file(path) as partial:
        _write(partial, path.stem, metadata, entries, _file_type(types, options.dtype))
    return remarks


def check_file(path: str | PathLike[str], *, overwrite: bool) -> None:
    """Raise, before any work, if no file can be written to `path`.

    Raises:
        ValueError: its name does not end in .gguf.
        OSError: it exists and `overwrite` is false, it is no GGUF file, or its directory cannot be written to.
    """
    path = Path(path).absolute()
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf: a GGUF export is one file.")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists: pass --overwrite (overwrite=True) to replace it.")
        if path.is_dir() or path.open("rb").read(4) not in (MAGIC, b""):
            raise FileExistsError(f"{path} is no GGUF file, and is not replaced: choose another place.")
    check_parent(path)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`: the inverse of `storage.gguf.hf_name`."""
    stem, _, kind = name.rpartition(".")
    for ours, theirs in OUTER.items():
        if stem == theirs:
            return f"{ours}.{kind}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{next(ours for ours, theirs in BLOCK.items() if part == theirs)}.{kind}"


def neighbour_rotation_order(values: Shaped[np.ndarray, "rows *rest"], heads: int) -> Shaped[np.ndarray, "rows *rest"]:
    """llama.cpp's order of query and key rows: the two of a rotary pair side by side."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _block_types(found: Modules) -> dict[str, BlockType]:
    types, problems = {}, []
    for name, tensor in found.packed.items():
        try:
            types[name] = block_type(tensor)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    refuse(problems)
    return types


def _remarks(found: Modules, types: dict[str, BlockType]) -> tuple[str, ...]:
    remarks = []
    if any(kind.name == "Q4_1" for kind in types.values()):
        remarks.append("minima of asymmetric groups are rounded to float16, which moves weights by under 1% of a step")
    if widened := sorted({tensor.spec.bits for tensor in found.packed.values() if tensor.spec.bits < 4}):
        remarks.append(f"codes of {' and '.join(map(str, widened))} bits take 4 bits each")
    return tuple(remarks)


def _entries(
    found: Modules,
    types: dict[str, BlockType],
    config: DecoderConfig,
    divisors: Float[np.ndarray, "pairs"] | None,
    dtype: str,
) -> Iterator[Entry]:
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def ordered(name: str, values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        projection = name.split(".")[-2]
        return neighbour_rotation_order(values, heads[projection]) if projection in heads else values

    if divisors is not None:
        yield Entry(DIVISORS, divisors.shape, "F32", lambda: divisors)
    for name, (leaf, transposed) in found.floats.items():
        stored = dtype if leaf.ndim == 2 else "float32"

        def floats(name=name, leaf=leaf, transposed=transposed, stored=stored):  # type: ignore[no-untyped-def]
            return ordered(name, as_dtype(name, leaf.T if transposed else leaf, stored))

        yield Entry(gguf_name(name), leaf.shape[::-1] if transposed else leaf.shape, FLOATS[stored], floats)
    for name, tensor in found.packed.items():
        weight = f"{name}.weight"

        def blocks(name=weight, tensor=tensor):  # type: ignore[no-untyped-def]
            return ordered(name, encode(tensor))

        yield Entry(gguf_name(weight), tensor.shape[::-1], types[name].name, blocks)


def _row_bytes(entry: Entry) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[entry.type]]
    return entry.shape[-1] // values * nbytes


def _nbytes(entry: Entry) -> int:
    return _row_bytes(entry) * int(np.prod(entry.shape[:-1]))


def _end_of_turn(model: Model, metadata: dict[str, Any]) -> dict[str, int]:
    """The second token that ends an answer, where the config names two."""
    ends = model.source.get("eos_token_id")
    others = (
        [end for end in ends if end != metadata.get("tokenizer.ggml.eos_token_id")] if isinstance(ends, list) else []
    )
    return {"tokenizer.ggml.eot_token_id": others[0]} if len(others) == 1 else {}


def _file_type(types: dict[str, BlockType], dtype: str) -> int:
    from gguf.constants import LlamaFileType

    names = [kind.name for kind in types.values()]
    name = max(set(names), key=names.count) if names else FLOATS[dtype]
    return int(LlamaFileType.ALL_F32 if name == "F32" else LlamaFileType[f"MOSTLY_{name}"])


def _write(path: Path, title: str, metadata: dict[str, Any], entries: list[Entry], file_type: int) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(title)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, key, value)
    for entry in entries:
        shape = (*entry.shape[:-1], _row_bytes(entry))  # in bytes, which is how the writer tells blocks
        writer.add_tensor_info(
            entry.name, shape, np.dtype(np.uint8), _nbytes(entry), raw_dtype=gguf.GGMLQuantizationType[entry.type]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(np.ascontiguousarray(entry.values()).view(np.uint8))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@contextmanager
def _replacing_file(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` at the end, and leaves nothing behind if that is not reached."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o644)  # mkstemp's is private
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
