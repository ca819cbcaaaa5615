"""Hugging Face directories: config.json, safetensors (one file or shards with an index), tokenizer files."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors asks for by name)
import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
UNREAD_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


class SafetensorsDirectory:
    """A `TensorSource` over a directory as `save_pretrained` writes it.

    Headers of all shards are read and checked at once; tensors are read one by one through a memory map.

    Raises:
        CheckpointError: a file is missing, corrupt, or disagrees with the index.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        config = read_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(self.path / "config.json", "is not a JSON object.")
        self.config: dict[str, Any] = config
        self._shards, self._shard_of = _open_shards(self.path)

    def names(self) -> list[str]:
        """Every tensor of every shard."""
        return list(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor as stored."""
        stored = self._slice(name).get_dtype()
        shard = self._shard_of[name]
        if stored not in STORED_DTYPES:
            raise CheckpointError(
                self.path / shard,
                f"tensor {name!r} is {stored}, not a float weight ({', '.join(STORED_DTYPES)}).",
            )
        return self._shards[shard].get_tensor(name)

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

    def _slice(self, name: str) -> Any:
        return self._shards[self._shard_of[name]].get_slice(name)


def read_json(path: Path) -> Any:
    """Parse one JSON file of a checkpoint; CheckpointError if it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def _open_shards(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Shard file -> open reader, and tensor -> shard file."""
    index = None
    if (directory / SINGLE).is_file():
        files = [SINGLE]
    elif (directory / INDEX).is_file():
        index = _read_index(directory / INDEX)
        files = sorted(set(index.values()))
    else:
        files = [_only_safetensors(directory)]
    shards: dict[str, Any] = {}
    shard_of: dict[str, str] = {}
    for file in files:
        shards[file] = _open_file(directory / file)
        for name in shards[file].keys():  # noqa: SIM118  (not a dict)
            if name in shard_of:
                raise CheckpointError(directory / file, f"tensor {name!r} is also in {shard_of[name]}.")
            shard_of[name] = file
    for name, file in (index or {}).items():
        if shard_of.get(name) != file:
            raise CheckpointError(directory / file, f"lacks tensor {name!r}, which {INDEX} places there.")
    return shards, shard_of


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
    if len(found) == 1:
        return found[0]
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


def _open_file(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(path, f"is not a whole safetensors file: {first_line(error)}") from None
