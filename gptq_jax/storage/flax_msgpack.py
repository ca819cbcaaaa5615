"""Where each array lies in a file that flax.serialization wrote: its msgpack structure, without the arrays' bytes.

The file is a map of maps. An array is msgpack's extension type 1, whose content is again msgpack: its shape, the name
of its dtype and its bytes in row-major order; type 3 is the same for a numpy scalar. An array above 2**30 bytes is a
map of flat pieces (flax/serialization.py: `_ndarray_to_bytes`, `_chunk`). Nothing else is read.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from gptq_jax.storage.base import BFLOAT16, CheckpointError
from gptq_jax.storage.fields import shown

CHUNKED = "__msgpack_chunked_array__"
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension types
DEPTH, NODES, NAME = 32, 2**20, 1024  # of a tree, in a file, bytes of a name: far more than a model has
_SIZES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (*_SIZES, "bool", "complex64", "complex128")}
DTYPES["bfloat16"] = BFLOAT16
# After tags that say the size themselves: what follows, and how many bytes hold its length or its value.
_TAGS: dict[int, tuple[str, int]] = {
    0xC0: ("nil", 0),
    0xC2: ("bool", 0),
    0xC3: ("bool", 0),
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCA + i: ("float", 4 << i) for i in range(2)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD0 + i: ("signed", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


@dataclass(frozen=True)
class StoredArray:
    """One array of a file.

    Attributes:
        file: that holds it.
        dtype: of its values.
        shape: of the array.
        pieces: the first byte in the file, and how many, of each piece of its values.
    """

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The array as stored; `name` is for errors."""
        values = np.empty(self.shape, self.dtype)
        target, filled = values.reshape(-1).view(np.uint8), 0
        with open(self.file, "rb") as stream:
            for start, count in self.pieces:
                stream.seek(start)
                filled += stream.readinto(target[filled : filled + count].data)  # type: ignore[attr-defined]
        if filled != values.nbytes:
            raise CheckpointError(self.file, f"array {name!r} is cut off: the file was changed while it was read.")
        return values


def read_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of one file by their path in its tree, like "model/layers/0/mlp/up_proj/kernel".

    Raises:
        CheckpointError: the file is cut off, damaged, or holds what flax.serialization does not write for parameters.
    """
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(path, "is empty.")
    with open(path, "rb") as stream:
        if stream.read(8) == b"version ":
            raise CheckpointError(path, "is a Git LFS pointer, not the file itself: run git lfs pull.")
        stream.seek(0)
        reader = _Reader(path, stream, size)
        tree = reader.value(())
        if stream.tell() != size:
            raise CheckpointError(path, f"has {size - stream.tell()} bytes after its end: it is no file of Flax.")
    if not isinstance(tree, dict):
        raise CheckpointError(path, "does not begin with a map: it is no file of Flax.")
    found: dict[str, StoredArray] = {}
    _flatten(path, tree, (), found)
    return found


class _Reader:
    """Walks through msgpack, and leaps over the bytes of arrays."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size, self.nodes = path, stream, size, 0

    def error(self, where: tuple[str, ...], problem: str) -> CheckpointError:
        name = repr("/".join(where)) if where else "the tree"
        return CheckpointError(self.path, f"{name} {problem}.")

    def take(self, count: int, where: tuple[str, ...]) -> bytes:
        data = self.stream.read(count)
        if len(data) != count:
            raise self.error(where, "is cut off by the end of the file")
        return data

    def head(self, where: tuple[str, ...]) -> tuple[str, int]:
        """The kind of the next value; its length, or the value of an integer or a bool."""
        tag = self.take(1, where)[0]
        if tag < 0x80 or tag >= 0xE0:
            return "int", tag if tag < 0x80 else tag - 256
        if tag < 0xC0:
            return ("map", tag & 15) if tag < 0x90 else ("list", tag & 15) if tag < 0xA0 else ("str", tag & 31)
        if 0xD4 <= tag <= 0xD8:
            return "ext", 1 << (tag - 0xD4)
        if tag not in _TAGS:
            raise self.error(where, f"begins with byte {tag:#04x}, which is no msgpack: the file is damaged")
        kind, width = _TAGS[tag]
        number = int.from_bytes(self.take(width, where), "big", signed=kind == "signed")
        if kind == "bool":
            number = tag - 0xC2
        return ("int" if kind == "signed" else kind), number

    def text(self, where: tuple[str, ...], kinds: tuple[str, ...]) -> str:
        kind, length = self.head(where)
        if kind not in kinds or length > NAME:
            raise self.error(where, f"holds {'a long name' if kind in kinds else f'a {kind}'} where a name should be")
        try:
            return self.take(length, where).decode()
        except UnicodeDecodeError:
            raise self.error(where, "holds a name that is no UTF-8") from None

    def value(self, where: tuple[str, ...]) -> Any:
        """The next value: a dict, a StoredArray, an int or a bool."""
        self.nodes += 1
        if len(where) > DEPTH or self.nodes > NODES:
            raise self.error(where, f"goes beyond a depth of {DEPTH} or {NODES} entries: no model has so many")
        kind, number = self.head(where)
        if kind in ("int", "bool"):
            return bool(number) if kind == "bool" else number
        if kind == "map":
            return self.mapping(where, number)
        if kind == "ext":
            return self.extension(where, number)
        raise self.error(where, f"is a {kind}, not an array or a map of arrays")

    def mapping(self, where: tuple[str, ...], entries: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(entries):
            name = self.text(where, ("str",))
            if name in found:
                raise self.error((*where, name), "occurs twice")
            found[name] = self.value((*where, name))
        return found

    def extension(self, where: tuple[str, ...], length: int) -> StoredArray:
        code = self.take(1, where)[0]
        end = self.stream.tell() + length
        if end > self.size:
            raise self.error(where, f"is cut off: it has {length} bytes, but the file ends before them")
        if code not in (NDARRAY, SCALAR):
            what = "a complex number" if code == COMPLEX else f"of msgpack's extension type {code}"
            raise self.error(where, f"is {what}, not an array")
        shape = self.shape(where)
        name = self.text(where, ("str", "bin"))
        if name not in DTYPES:
            raise self.error(where, f"has the dtype {shown(name)}, which is not known")
        kind, nbytes = self.head(where)
        start, dtype = self.stream.tell(), DTYPES[name]
        if kind not in ("bin", "str") or start + nbytes != end or prod(shape) * dtype.itemsize != nbytes:
            raise self.error(where, f"has shape {shown(shape)} and dtype {name}, but not the bytes of such an array")
        self.stream.seek(end)
        return StoredArray(self.path, dtype, shape, ((start, nbytes),))

    def shape(self, where: tuple[str, ...]) -> tuple[int, ...]:
        if self.head(where) != ("list", 3):
            raise self.error(where, "is not a shape, a dtype and bytes")
        kind, rank = self.head(where)
        if kind != "list" or rank > DEPTH:
            raise self.error(where, "has no shape")
        sizes = [self.head(where) for _ in range(rank)]
        if any(kind != "int" or not 0 <= size < 2**63 for kind, size in sizes):
            raise self.error(where, "has a shape that is not of sizes")
        return tuple(size for _, size in sizes)


def _flatten(path: Path, tree: dict[str, Any], where: tuple[str, ...], found: dict[str, StoredArray]) -> None:
    for key, value in tree.items():
        here = (*where, key)
        name = "/".join(here)
        if isinstance(value, dict) and CHUNKED in value:
            value = _joined(path, name, value)
        if isinstance(value, dict):
            _flatten(path, value, here, found)
        elif name in found:
            raise CheckpointError(path, f"{name!r} occurs twice.")
        elif isinstance(value, StoredArray):
            found[name] = value
        else:
            raise CheckpointError(path, f"{name!r} is the number {value}, not an array.")


def _joined(path: Path, name: str, value: dict[str, Any]) -> StoredArray:
    """The array whose pieces a chunked one lists."""
    shape, chunks = (_numbered(value.get(key)) for key in ("shape", "chunks"))
    whole = (
        bool(chunks)
        and all(isinstance(chunk, StoredArray) and len(chunk.shape) == 1 for chunk in chunks)
        and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        and len({chunk.dtype for chunk in chunks}) == 1
        and prod(shape) == sum(chunk.shape[0] for chunk in chunks)
    )
    if not whole:
        raise CheckpointError(path, f"{name!r} is an array in pieces that do not make up its shape {shown(shape)}.")
    return StoredArray(path, chunks[0].dtype, tuple(shape), tuple(piece for chunk in chunks for piece in chunk.pieces))


def _numbered(entries: Any) -> list[Any]:
    """The values of {"0": ..., "1": ...}; none if it is anything else."""
    if not isinstance(entries, dict) or set(entries) != set(map(str, range(len(entries)))):
        return []
    return [entries[str(index)] for index in range(len(entries))]
