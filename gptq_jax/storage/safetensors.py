"""Hugging Face directories: config.json, safetensors (one file or shards with an index), tokenizer files."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.hf_directory import join_shards, read_config, read_index, read_tokenizer
from gptq_jax.storage.safetensors_header import StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AUTOGPTQ = "gptq_model-"  # gptq_model-4bit-128g.safetensors
STORED_DTYPES = ("F32", "F16", "BF16")
UNREAD_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


class SafetensorsDirectory:
    """A `TensorSource` over a directory as `save_pretrained` writes it.

    Headers of all shards are read and checked at once; tensors are read one by one, when asked.

    Raises:
        CheckpointError: a file is missing, corrupt, or disagrees with the index.
    """

    format = "safetensors"

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.config: dict[str, Any] = read_config(self.config_file)
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

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies."""
        return self._tensors[name]

    def packed(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor of any dtype as stored: words, indices or scales."""
        return self._tensors[name].read(name)

    def tokenizer(self) -> Any | None:
        """The directory's tokenizer; its own Python code, if it has any, is never run."""
        return read_tokenizer(self.path)


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if (found := _index(directory)) is not None:
        return join_shards(directory, read_index(directory / found), read_header)
    return read_header(directory / _only_safetensors(directory))


def _index(directory: Path) -> str | None:
    """The index: transformers' name for it, or the one there is (AutoGPTQ names it after its own file)."""
    if (directory / INDEX).is_file():
        return INDEX
    found = sorted(file.name for file in directory.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise CheckpointError(directory, f"holds {len(found)} indexes, {' and '.join(found[:2])}: keep one.")
    return found[0] if found else None


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
