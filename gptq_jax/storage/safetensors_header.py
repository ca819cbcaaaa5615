"""Where each tensor of a safetensors file lies: its header, checked by the safetensors library and read once.

Tensors are then read from the file, not through a memory map whose pages would count as this process's own.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import BFLOAT16, CheckpointError

# Of the types a checkpoint may hold, those that numpy can.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: that holds it.
        dtype: by safetensors' name.
        shape: of the tensor.
        start: its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The tensor as stored; `name` is for errors."""
        if self.dtype not in DTYPES:
            raise CheckpointError(self.file, f"tensor {name!r} is {self.dtype}, which is not supported.")
        dtype, count = DTYPES[self.dtype], prod(self.shape)
        found = np.fromfile(self.file, dtype, count, offset=self.start)
        if found.size != count:
            raise CheckpointError(self.file, f"tensor {name!r} is cut off: the file was changed while it was read.")
        return found.reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises:
        CheckpointError: the file is not whole, or two tensors have one name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks all offsets, sizes and types against one another and the file; the map is closed again.
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=unique_keys)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not a whole safetensors file: {first_line(error)}") from None
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, or ValueError where a key occurs twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} occurs twice")
        found[key] = value
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
