"""What Hugging Face directories have in common, whatever their weights are stored in: JSON, shards, a tokenizer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptq_jax.storage.base import CheckpointError, Stored
from gptq_jax.storage.safetensors_header import first_line, unique_keys

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


InFile = TypeVar("InFile", bound=Stored)


def read_json(path: Path) -> Any:
    """Parse one JSON file of a checkpoint; CheckpointError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {first_line(error)}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; CheckpointError if it is missing or no JSON object."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is not a JSON object.")
    return config


def read_index(path: Path) -> dict[str, str]:
    """The "weight_map" of an index, from tensor to file; CheckpointError if a file is not there or no plain name."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, 'has no "weight_map" from tensor to file.')
    for name, file in weight_map.items():
        # A name with a separator, or a drive, could lead out of the directory.
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
            raise CheckpointError(path, f"places tensor {name!r} in {file!r}, which is not a plain file name.")
        if not (path.parent / file).is_file():
            raise CheckpointError(path, f"names shard {file!r}, which is not there: download it too.")
    return weight_map


def join_shards(
    directory: Path, index: Mapping[str, str], read: Callable[[Path], dict[str, InFile]]
) -> dict[str, InFile]:
    """The tensors of all shards; CheckpointError if two have one name, or the index places one elsewhere.

    Args:
        directory: that holds the shards.
        index: the file of each tensor.
        read: gives the tensors of one file.
    """
    tensors: dict[str, InFile] = {}
    for file in sorted(set(index.values())):
        for name, tensor in read(directory / file).items():
            if name in tensors:
                raise CheckpointError(directory / file, f"tensor {name!r} is also in {tensors[name].file.name}.")
            tensors[name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(directory / file, f"lacks tensor {name!r}, which the index places there.")
    return tensors


def read_tokenizer(directory: Path) -> Any | None:
    """The directory's tokenizer, or None if it has none; its own Python code, if it has any, is never run."""
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Anything can come out of a foreign tokenizer.json: the Rust library raises plain Exception.
        raise CheckpointError(directory, f"the tokenizer cannot be read: {first_line(error)}") from error
    if len(tokenizer) == 0:
        raise CheckpointError(directory, "the tokenizer has no vocabulary: add tokenizer.json.")
    return tokenizer
