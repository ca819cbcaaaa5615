"""Packed weights as GGUF's blocks of 32: the same codes and scales, nothing is quantized anew.

Q4_0 is `d * (q - 8)`, Q4_1 is `d * q + m`, Q8_0 is `d * q` with signed q; d and m are float16.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from gptq_jax.storage.packed.words import unpack_words
from gptq_jax.tensor import QuantizedTensor

BLOCK = 32


class BlockType(NamedTuple):
    """A quantized type of GGUF: its name, and the bytes of a block."""

    name: str
    nbytes: int


Q4_0, Q4_1, Q8_0 = BlockType("Q4_0", 18), BlockType("Q4_1", 20), BlockType("Q8_0", 34)


def block_type(tensor: QuantizedTensor) -> BlockType:
    """The type whose blocks hold a weight.

    Raises:
        ValueError: none does; why.
    """
    spec, d_in = tensor.spec, tensor.d_in
    if tensor.group_of_row is not None:
        raise ValueError("rows are in activation order, but a block's inputs are neighbours: use static groups")
    if d_in % BLOCK:
        raise ValueError(f"{d_in} inputs are no multiple of the {BLOCK} of a block")
    rows = spec.group_rows(d_in)
    if rows % BLOCK and rows != d_in:
        raise ValueError(f"groups of {rows} are no multiple of the {BLOCK} inputs of a block: use 32, 64 or 128")
    if spec.bits == 8 and not spec.symmetric:
        raise ValueError("no GGUF type holds 8 bits with zero points: use symmetric 8 bits, or 4 bits")
    scales = np.asarray(tensor.scales)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales.astype(np.float32)):
        raise ValueError(f"the {scales.dtype} scales are not float16 numbers, which are all that a block holds")
    if spec.bits == 8:
        return Q8_0
    return Q4_0 if spec.symmetric else Q4_1


def encode(tensor: QuantizedTensor) -> UInt8[np.ndarray, "d_out row_bytes"]:
    """A weight's blocks, a row for each output.

    Of an asymmetric weight the minimum `-zero * scale` is rounded to float16, which moves weights by less than
    a hundredth of a step; all else is exact.

    Raises:
        ValueError: see `block_type`; or a minimum is beyond float16.
    """
    kind, spec, d_in, d_out = block_type(tensor), tensor.spec, tensor.d_in, tensor.d_out
    blocks = d_in // BLOCK
    codes = unpack_words(np.asarray(tensor.codes), spec.bits, d_in).T.reshape(d_out, blocks, BLOCK)
    group = np.arange(blocks) * BLOCK // spec.group_rows(d_in)
    scales = np.asarray(tensor.scales)[group].T  # [d_out, blocks]
    out = np.empty((d_out, blocks, kind.nbytes), np.uint8)
    out[..., :2] = _half_bytes(scales)
    if kind is Q8_0:
        out[..., 2:] = codes - np.uint8(128)  # modulo 256, which is the signed number
        return out.reshape(d_out, -1)
    if kind is Q4_1:
        zeros = np.asarray(tensor.zeros)[group].T
        minima = -zeros.astype(np.float32) * scales.astype(np.float32)
        if np.abs(minima).max() > np.finfo(np.float16).max:
            raise ValueError("a minimum is beyond float16")
        out[..., 2:4] = _half_bytes(minima)
    else:
        codes = codes + np.uint8(8 - 2 ** (spec.bits - 1))
    out[..., -BLOCK // 2 :] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << np.uint8(4)
    return out.reshape(d_out, -1)


def _half_bytes(values: np.ndarray) -> UInt8[np.ndarray, "d_out blocks 2"]:
    return np.ascontiguousarray(values, dtype="<f2")[..., None].view(np.uint8)
