"""The header of a GGUF file, every count and offset checked against the file's size before it is believed.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader loops over
whatever counts it finds, so a damaged file could keep it busy for ever.
"""

import math
import struct
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from gptq_jax.storage.base import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
STRING, ARRAY = 8, 9
# GGUF's value types, by number.
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: slowest dimension first, as in numpy and in Hugging Face's tensors.
        type: a `gguf.GGMLQuantizationType`.
        row_bytes: bytes of one row (the last dimension).
        start: byte of the file where the data begin.
        nbytes: bytes of all rows.
    """

    shape: tuple[int, ...]
    type: Any
    row_bytes: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata as Python values (numbers of arrays as lists), and the tensors by their GGUF names."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str | PathLike[str], data: UInt8[np.ndarray, "size"]) -> Header:
    """Read the header of the file at `path`, whose bytes are `data`; CheckpointError if anything is wrong."""
    cursor = _Cursor(Path(path), data.data)
    if cursor.size < 24 or bytes(cursor.take(4)) != MAGIC:
        raise CheckpointError(path, "is not a GGUF file (it does not begin with 'GGUF').")
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(path, f"is a {kind} GGUF file; little-endian versions 2 and 3 can be read.")
    n_tensors = cursor.scalar("<Q")
    n_keys = cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(path, f"metadata key {key!r} occurs twice.")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    raw = [_raw_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(path, f"general.alignment is {alignment!r}, not a power of two.")
    return Header(metadata, _place(cursor, raw, -(-cursor.position // alignment) * alignment))


class _Cursor:
    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.size, self.position = path, data, len(data), 0

    def take(self, nbytes: int) -> memoryview:
        end = self.position + nbytes
        if end > self.size:
            raise CheckpointError(
                self.path,
                f"is truncated or corrupt: its header asks for byte {end} of a file of {self.size}.",
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def scalar(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        text = bytes(self.take(self.scalar("<Q")))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise CheckpointError(self.path, f"is corrupt: the string {text[:40]!r} is not UTF-8.") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return np.frombuffer(self.take(SCALARS[kind].itemsize), SCALARS[kind])[0].item()
        if kind != ARRAY:
            raise CheckpointError(self.path, f"is corrupt: there is no metadata type {kind}.")
        kind = self.scalar("<I")
        if kind == STRING:
            return [self.string() for _ in range(self.scalar("<Q"))]
        if kind not in SCALARS:
            raise CheckpointError(self.path, f"is corrupt: there are no metadata arrays of type {kind}.")
        length = self.scalar("<Q")
        return np.frombuffer(self.take(length * SCALARS[kind].itemsize), SCALARS[kind]).tolist()


def _raw_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.string(), cursor.scalar("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise CheckpointError(cursor.path, f"is corrupt: tensor {name!r} has {n_dims} dimensions.")
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims))
    return name, dims[::-1], cursor.scalar("<I"), cursor.scalar("<Q")


def _place(cursor: _Cursor, raw: list[tuple[str, tuple[int, ...], int, int]], begin: int) -> dict[str, TensorInfo]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors: dict[str, TensorInfo] = {}
    for name, shape, number, offset in raw:
        if name in tensors:
            raise CheckpointError(cursor.path, f"tensor {name!r} occurs twice.")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(cursor.path, f"tensor {name!r} has the unknown type {number}.") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise CheckpointError(
                cursor.path,
                f"is corrupt: tensor {name!r} has shape {shape}, but {kind.name} stores {block} at a time.",
            )
        row_bytes = shape[-1] // block * block_bytes
        nbytes = math.prod(shape[:-1]) * row_bytes
        if begin + offset + nbytes > cursor.size:
            raise CheckpointError(
                cursor.path,
                f"is truncated or corrupt: tensor {name!r} should end at byte {begin + offset + nbytes}.",
            )
        tensors[name] = TensorInfo(shape=shape, type=kind, row_bytes=row_bytes, start=begin + offset, nbytes=nbytes)
    end, previous = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise CheckpointError(cursor.path, f"is corrupt: tensors {previous!r} and {name!r} overlap.")
        end, previous = info.start + info.nbytes, name
    return tensors
