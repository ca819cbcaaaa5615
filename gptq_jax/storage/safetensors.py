"""Hugging Face directories: config.json, safetensors (one file or shards with an index), tokenizer files."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.safetensors_header import StoredTensor, first_line, read_header, unique_keys

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AUTOGPTQ = "gptq_model-"  # gptq_model-4bit-128g.safetensors
STORED_DTYPES = ("F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
UNREAD_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


class SafetensorsDirectory:
    """A `TensorSource` over a directory as `save_pretrained` writes it.

    Headers of all shards are read and checked at once; tensors are read one by one, when asked.

    Raises:
        CheckpointError: a file is missing, corrupt, or disagrees with the index.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        config = read_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(self.path / "config.json", "is not a JSON object.")
        self.config: dict[str, Any] = config
        self._tensors = _read_shards(self.path)

    def names(self) -> list[str]:
        """Every tensor of every shard."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The dtype of one tensor by safetensors' name, like "BF16" or "I32"."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One float weight as stored."""
        found = self._tensors[name]
        if found.dtype not in STORED_DTYPES:
            raise CheckpointError(
                found.file,
                f"tensor {name!r} is {found.dtype}, not a float weight ({', '.join(STORED_DTYPES)}).",
            )
        return found.read(name)

    def packed(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor of any dtype as stored: words, indices or scales."""
        return self._tensors[name].read(name)

    def tokenizer(self) -> Any | None:
        """The directory's tokenizer; its own Python code, if it has any, is never run."""
        if not any((self.path / file).is_file() for file in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            # Anything can come out of a foreign tokenizer.json: the Rust library raises plain Exception.
            raise CheckpointError(self.path, f"the tokenizer cannot be read: {first_line(error)}") from error
        if len(tokenizer) == 0:
            raise CheckpointError(self.path, "the tokenizer has no vocabulary: add tokenizer.json.")
        return tokenizer


def read_json(path: Path) -> Any:
    """Parse one JSON file of a checkpoint; CheckpointError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {first_line(error)}") from None


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards."""
    index = None
    if (directory / SINGLE).is_file():
        files = [SINGLE]
    elif (found := _index(directory)) is not None:
        index = _read_index(directory / found)
        files = sorted(set(index.values()))
    else:
        files = [_only_safetensors(directory)]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if name in tensors:
                raise CheckpointError(directory / file, f"tensor {name!r} is also in {tensors[name].file.name}.")
            tensors[name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(directory / file, f"lacks tensor {name!r}, which the index places there.")
    return tensors


def _index(directory: Path) -> str | None:
    """The index: transformers' name for it, or the one there is (AutoGPTQ names it after its own file)."""
    if (directory / INDEX).is_file():
        return INDEX
    found = sorted(file.name for file in directory.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise CheckpointError(directory, f"holds {len(found)} indexes, {' and '.join(found[:2])}: keep one.")
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, str]:
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


def _only_safetensors(directory: Path) -> str:
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    autogptq = [name for name in found if name.startswith(AUTOGPTQ)]
    for names in (found, autogptq):
        if len(names) == 1:
            return names[0]
    if found:
        raise CheckpointError(directory, f"holds {len(found)} safetensors files but no {INDEX} to join them.")
    unread = sorted(file.name for file in directory.iterdir() if file.suffix in UNREAD_SUFFIXES)
    if unread:
        raise CheckpointError(
            directory,
            f"holds {unread[0]} but no safetensors; pickle files are never opened: convert them where you "
            "trust them, transformers' from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors.",
        )
    raise CheckpointError(directory, f"holds no weights: neither {SINGLE} nor {INDEX}.")
