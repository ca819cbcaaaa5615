"""What Flax models of transformers 4 wrote: flax_model.msgpack, its shards, or the same tree in model.safetensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import FLOAT_DTYPES, CheckpointError, Stored
from gptq_jax.storage.flax_msgpack import read_arrays
from gptq_jax.storage.flax_names import HEAD, NEVER_TIED, FlaxName, torch_names
from gptq_jax.storage.hf_directory import join_shards, read_config, read_index, read_tokenizer
from gptq_jax.storage.safetensors import SafetensorsDirectory

SINGLE = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
SUFFIX = ".msgpack"


class FlaxTree:
    """A `TensorSource` over the parameters of a Flax model of transformers 4.

    Args:
        path: the directory or the file.
        config_file: the config.json.
        arrays: by their path in the tree, joined by "/".
        format: of the files, in words.

    Raises:
        CheckpointError: two parameters have one name.
    """

    def __init__(self, path: Path, config_file: Path, arrays: Mapping[str, Stored], format: str) -> None:
        self.path, self.config_file, self.format = path, config_file, format
        self.config: dict[str, Any] = read_config(config_file)
        self._arrays = arrays
        self._names = named_as_torch(path, arrays, self.config)

    def names(self) -> list[str]:
        """Every parameter, by torch's name."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one parameter as torch has it, without reading it."""
        found = self._names[name]
        shape = self._arrays[found.path].shape
        return shape[::-1] if found.transposed else shape

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One parameter as torch has it; a kernel is a transposed view of what is stored."""
        found = self._names[name]
        values = self._arrays[found.path].read(found.path)
        if values.dtype not in FLOAT_DTYPES:
            floats = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
            raise CheckpointError(
                self._arrays[found.path].file, f"{found.path!r} is {values.dtype}, not a float weight ({floats})."
            )
        return values.T if found.transposed else values

    def tokenizer(self) -> Any | None:
        """The tokenizer beside the config.json; its own Python code, if it has any, is never run."""
        return read_tokenizer(self.config_file.parent)


def named_as_torch(path: Path, paths: Iterable[str], config: dict[str, Any]) -> dict[str, FlaxName]:
    """`torch_names` of a tree in the file or directory `path`; a head of its own is noted in `config`.

    Raises:
        CheckpointError: two parameters have one name.
    """
    try:
        names = torch_names(paths)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from None
    if config.get("model_type") in NEVER_TIED and f"{HEAD}.weight" in names:
        config["tie_word_embeddings"] = False
    return names


def is_flax(path: Path) -> bool:
    """Whether a file is Flax's msgpack, or a directory holds such and no safetensors, which have precedence."""
    if path.is_file():
        return path.suffix == SUFFIX
    return any((path / file).is_file() for file in (SINGLE, INDEX)) and not any(path.glob("*.safetensors"))


def open_flax(path: Path, config_file: Path) -> FlaxTree:
    """The tree in a msgpack file, or in flax_model.msgpack or its shards in a directory.

    Their structure is read and checked at once, arrays when asked.

    Raises:
        CheckpointError: a file is missing, damaged, or disagrees with the index.
    """
    if path.is_file():
        arrays = read_arrays(path)
    elif (path / SINGLE).is_file():
        arrays = read_arrays(path / SINGLE)
    else:
        arrays = join_shards(path, read_index(path / INDEX), read_arrays)
    return FlaxTree(path, config_file, arrays, "Flax msgpack")


def as_flax_tree(source: SafetensorsDirectory) -> FlaxTree | None:
    """The Flax tree that `save_pretrained(safe_serialization=True)` wrote under its own names; None if torch's are."""
    if not any(name.endswith((".kernel", ".embedding")) for name in source.names()):
        return None
    arrays = {name.replace(".", "/"): source.stored(name) for name in source.names()}
    return FlaxTree(source.path, source.config_file, arrays, "Flax safetensors")
