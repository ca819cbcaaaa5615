"""Codes <-> 32-bit words in numpy, for any width: the bit streams that checkpoints are made of."""

import math

import numpy as np
from jaxtyping import Integer, UInt8, UInt32

# Planes of the planar layout, low bits first.
PLANES = {3: (2, 1)}


def pack_words(codes: Integer[np.ndarray, "count columns"], bits: int) -> UInt32[np.ndarray, "words columns"]:
    """Pack codes below 2**bits down each column, a little-endian bit stream; the last word is zero-filled.

    The same layout as `pallas_kernels.packing.pack`, which computes on a device.
    """
    count, columns = codes.shape
    run, run_words = _run(bits)
    runs = -(-count // run)
    words = np.zeros((runs * run_words, columns), np.uint32)
    for place in range(min(run, count)):
        word, shift = divmod(place * bits, 32)
        values = codes[place::run].astype(np.uint32)
        words[word::run_words][: len(values)] |= values << np.uint32(shift)
        if shift + bits > 32:
            words[word + 1 :: run_words][: len(values)] |= values >> np.uint32(32 - shift)
    return words[: -(-count * bits // 32)]


def unpack_words(
    words: UInt32[np.ndarray, "words columns"], bits: int, count: int
) -> UInt8[np.ndarray, "{count} columns"]:
    """The `count` codes of each column that `pack_words` packed."""
    run, run_words = _run(bits)
    codes = np.empty((count, words.shape[1]), np.uint8)
    for place in range(min(run, count)):
        word, shift = divmod(place * bits, 32)
        found = codes[place::run]
        values = words[word::run_words][: len(found)] >> np.uint32(shift)
        if shift + bits > 32:
            values |= words[word + 1 :: run_words][: len(found)] << np.uint32(32 - shift)
        found[...] = values & np.uint32(2**bits - 1)
    return codes


def unpack_planes(
    words: UInt32[np.ndarray, "words columns"], bits: int, count: int
) -> UInt8[np.ndarray, "{count} columns"]:
    """Codes of the planar layout: every 32 codes are `bits` words, first all their low bits, then the higher ones."""
    columns = words.shape[1]
    blocks = -(-count // 32)
    padded = np.zeros((blocks * bits, columns), np.uint32)
    padded[: len(words)] = words
    in_blocks = padded.reshape(blocks, bits, columns)
    codes = np.zeros((blocks, 32, columns), np.uint8)
    below = 0
    for width in PLANES[bits]:
        plane = in_blocks[:, below : below + width].reshape(blocks * width, columns)
        codes |= unpack_words(plane, width, blocks * 32).reshape(codes.shape) << np.uint8(below)
        below += width
    return codes.reshape(blocks * 32, columns)[:count]


def pack_rows(values: Integer[np.ndarray, "rows count"], bits: int) -> UInt32[np.ndarray, "rows words"]:
    """`pack_words` along the second axis, as zero points are packed along the outputs."""
    return np.ascontiguousarray(pack_words(values.T, bits).T)


def unpack_rows(words: UInt32[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows {count}"]:
    """`unpack_words` along the second axis."""
    return np.ascontiguousarray(unpack_words(words.T, bits, count).T)


def _run(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole words: how many codes, and how many words."""
    codes = 32 // math.gcd(bits, 32)
    return codes, codes * bits // 32
