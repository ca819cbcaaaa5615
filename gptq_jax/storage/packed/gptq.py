"""Hugging Face's GPTQ layout: qweight, qzeros, scales and g_idx, as AutoGPTQ, GPTQModel and vLLM have it.

Versions differ in the zero points: `gptq` (v1) stores them minus one, `gptq_v2` as they are, and `gptq_p` is v2
with codes in bit planes. The config is in `gptq_config`.
"""

import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from gptq_jax.spec import QuantSpec
from gptq_jax.storage.packed.base import (
    INDEX_DTYPES,
    SCALE_DTYPES,
    WORD_DTYPES,
    Arrays,
    ModuleGrid,
    Stored,
    module_grid,
    row_groups,
    stored_zeros,
)
from gptq_jax.storage.packed.words import PLANES, pack_rows, pack_words, unpack_planes, unpack_rows
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import packed_words

VERSIONS = ("gptq", "gptq_v2", "gptq_p")
CODES = "qweight"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# What v1 subtracts: from whole words, so that a zero of 0 borrows from its neighbour. 3 bits: from each field.
_ONES = {2: np.uint32(0x55555555), 4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


def layout(spec: QuantSpec, d_in: int, d_out: int) -> dict[str, Stored]:
    """The tensors of a module with `d_in` inputs and `d_out` outputs."""
    groups = spec.groups(d_in)
    return {
        "qweight": Stored(shapes=((packed_words(d_in, spec.bits), d_out),), dtypes=WORD_DTYPES),
        "qzeros": Stored(shapes=((groups, packed_words(d_out, spec.bits)),), dtypes=WORD_DTYPES),
        "scales": Stored(shapes=((groups, d_out),), dtypes=SCALE_DTYPES),
        "g_idx": Stored(shapes=((d_in,),), dtypes=INDEX_DTYPES, optional=True),
    }


def read_grid(arrays: Arrays, spec: QuantSpec, d_in: int, d_out: int, *, version: str) -> ModuleGrid:
    """Scales, true zero points and groups of one module.

    A symmetric module that says v1 but stores the middle code itself is taken at its word for the data: some
    tools wrote true zeros under v1's name.

    Raises:
        ValueError: scales are not finite, or g_idx is out of range.
    """
    words = arrays["qzeros"].view(np.uint32)
    notes: tuple[str, ...] = ()
    zeros = unpack_zeros(words, spec.bits, d_out, version=version)
    if version == "gptq" and spec.symmetric:
        as_stored = unpack_zeros(words, spec.bits, d_out, version="gptq_v2")
        if (as_stored == 2 ** (spec.bits - 1)).all():
            zeros, notes = as_stored, ("claims gptq v1 but stores true zeros",)
    return module_grid(spec, d_in, scales=arrays["scales"], zeros=zeros, group_of_row=arrays.get("g_idx"), notes=notes)


def read_codes(
    stored: Shaped[np.ndarray, "stored_words d_out"], spec: QuantSpec, d_in: int, d_out: int, *, version: str
) -> UInt32[np.ndarray, "words d_out"]:
    """`qweight` as `QuantizedTensor` has it, which is the same words but for bit planes."""
    words = stored.view(np.uint32)
    if version != "gptq_p" or spec.bits not in PLANES:
        return words
    return pack_words(unpack_planes(words, spec.bits, d_in), spec.bits)


def unpack_zeros(
    words: UInt32[np.ndarray, "groups words"], bits: int, d_out: int, *, version: str
) -> UInt8[np.ndarray, "groups d_out"]:
    """The true zero points in `qzeros`."""
    if version == "gptq_p" and bits in PLANES:
        return np.ascontiguousarray(unpack_planes(words.T, bits, d_out).T)
    if version != "gptq":
        return unpack_rows(words, bits, d_out)
    if bits in _ONES:
        return unpack_rows(words + _ONES[bits], bits, d_out)
    return (unpack_rows(words, bits, d_out) + np.uint8(1)) & np.uint8(2**bits - 1)


def pack_zeros(
    zeros: UInt8[np.ndarray, "groups d_out"], bits: int, *, version: str
) -> UInt32[np.ndarray, "groups words"]:
    """The inverse of `unpack_zeros`, for v1 and v2."""
    if version != "gptq":
        return pack_rows(zeros, bits)
    if bits in _ONES:
        return pack_rows(zeros, bits) - _ONES[bits]
    return pack_rows((zeros - np.uint8(1)) & np.uint8(2**bits - 1), bits)


def encode(tensor: QuantizedTensor, *, version: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a module by suffix: the inverse of `read_grid` and `read_codes`.

    Args:
        tensor: its codes, zeros and groups are written as they are, scales in float16.
        version: "gptq" or "gptq_v2".

    Raises:
        ValueError: the format cannot hold the tensor.
    """
    spec, d_in, d_out = tensor.spec, tensor.d_in, tensor.d_out
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"version {version!r} cannot be written: use 'gptq' or 'gptq_v2'.")
    if spec.bits == 3 and (d_in % 32 or d_out % 32):
        raise ValueError(f"at 3 bits the format needs multiples of 32, not {d_in} inputs and {d_out} outputs.")
    scales = np.asarray(tensor.scales)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales.astype(np.float32)):
        raise ValueError(f"the {scales.dtype} scales are not float16 numbers, which are all that the format holds.")
    return {
        "qweight": np.asarray(tensor.codes).view(np.int32),
        "qzeros": pack_zeros(stored_zeros(tensor), spec.bits, version=version).view(np.int32),
        "scales": halves,
        "g_idx": row_groups(tensor),
    }
