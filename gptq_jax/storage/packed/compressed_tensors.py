"""compressed-tensors' `pack-quantized` layout, as llm-compressor writes it and vLLM reads it.

GPTQ's arrays transposed, with true zero points and none at all where the grid is symmetric. At 3 bits, versions
before 0.18 put 10 codes in a word and left 2 bits; the width says which it is. The config is in
`compressed_tensors_config`.
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
    stored_zeros,
)
from gptq_jax.storage.packed.words import pack_words, unpack_words
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import packed_words

CODES = "weight_packed"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def layout(spec: QuantSpec, d_in: int, d_out: int) -> dict[str, Stored]:
    """The tensors of a module with `d_in` inputs and `d_out` outputs."""
    groups = spec.groups(d_in)
    return {
        "weight_packed": Stored(shapes=tuple((d_out, words) for words in _widths(d_in, spec.bits)), dtypes=WORD_DTYPES),
        "weight_scale": Stored(shapes=((d_out, groups),), dtypes=SCALE_DTYPES),
        "weight_shape": Stored(shapes=((2,),), dtypes=INDEX_DTYPES),
        "weight_zero_point": Stored(
            shapes=tuple((words, groups) for words in _widths(d_out, spec.bits)),
            dtypes=WORD_DTYPES,
            optional=spec.symmetric,
        ),
        "weight_g_idx": Stored(shapes=((d_in,),), dtypes=INDEX_DTYPES, optional=True),
    }


def read_grid(arrays: Arrays, spec: QuantSpec, d_in: int, d_out: int) -> ModuleGrid:
    """Scales, zero points and groups of one module.

    Raises:
        ValueError: weight_shape is another, scales are not finite, or weight_g_idx is out of range.
    """
    if arrays["weight_shape"].tolist() != [d_out, d_in]:
        raise ValueError(f"weight_shape holds {arrays['weight_shape'].tolist()}, not {[d_out, d_in]}")
    zeros = None
    if "weight_zero_point" in arrays:
        words = np.ascontiguousarray(arrays["weight_zero_point"]).view(np.uint32)
        zeros = np.ascontiguousarray(_unpack(words, spec.bits, d_out).T)
    groups = arrays.get("weight_g_idx")
    if groups is not None and (groups == -1).all():
        groups = None  # how llm-compressor marks that there is no order
    scales = np.ascontiguousarray(arrays["weight_scale"].T)
    return module_grid(spec, d_in, scales=scales, zeros=zeros, group_of_row=groups)


def read_codes(
    stored: Shaped[np.ndarray, "d_out stored_words"], spec: QuantSpec, d_in: int, d_out: int
) -> UInt32[np.ndarray, "words d_out"]:
    """`weight_packed` as `QuantizedTensor` has it: its transpose, packed anew where words have unused bits."""
    words = stored.view(np.uint32).T
    if len(words) != packed_words(d_in, spec.bits):
        return pack_words(_unpack(words, spec.bits, d_in), spec.bits)
    return np.ascontiguousarray(words)


def encode(tensor: QuantizedTensor) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a module by suffix: the inverse of `read_grid` and `read_codes`; scales keep their dtype.

    Raises:
        ValueError: the format cannot hold the tensor.
    """
    spec, d_in, d_out = tensor.spec, tensor.d_in, tensor.d_out
    if tensor.group_of_row is not None:
        raise ValueError("rows are in activation order, which the format no longer holds: use static groups.")
    if d_in % spec.group_rows(d_in):
        raise ValueError(f"{d_in} inputs are no multiple of the group size {spec.group_size}, as the format needs.")
    arrays = {
        "weight_packed": np.ascontiguousarray(np.asarray(tensor.codes).T).view(np.int32),
        "weight_scale": np.ascontiguousarray(np.asarray(tensor.scales).T),
        "weight_shape": np.array([d_out, d_in], np.int64),
    }
    if not spec.symmetric:
        arrays["weight_zero_point"] = pack_words(stored_zeros(tensor).T, spec.bits).view(np.int32)
    return arrays


def _widths(count: int, bits: int) -> tuple[int, ...]:
    """The words that `count` codes may take: dense, or as many whole codes as fit in each."""
    return tuple(dict.fromkeys((packed_words(count, bits), -(-count // (32 // bits)))))


def _unpack(words: UInt32[np.ndarray, "words columns"], bits: int, count: int) -> UInt8[np.ndarray, "{count} columns"]:
    if len(words) == packed_words(count, bits):
        return unpack_words(words, bits, count)
    codes = np.empty((count, words.shape[1]), np.uint8)
    each = 32 // bits
    for place in range(each):
        found = codes[place::each]
        found[...] = words[: len(found)] >> np.uint32(bits * place) & np.uint32(2**bits - 1)
    return codes
