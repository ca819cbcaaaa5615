"""Integer codes <-> uint32 words: a little-endian bit stream along the input axis.

Code k of each run of 32 codes is bits [k*bits, (k+1)*bits) of `bits` consecutive words, which for 2, 4 and 8
bits never cross a word and for 3 bits do twice (codes 10 and 21). This is the order of `qweight` in Hugging
Face's GPTQ checkpoints, with any number of inputs: the last word is zero-filled.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8, UInt32

SUPPORTED_BITS = (2, 3, 4, 8)


def packed_words(d_in: int, bits: int) -> int:
    """The number of words that hold `d_in` codes."""
    return -(-d_in * bits // 32)


def shortest_run(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole words: how many codes, and how many words."""
    codes = 32 // math.gcd(bits, 32)
    return codes, codes * bits // 32


def pack(codes: Integer[Array, "d_in d_out"], bits: int) -> UInt32[Array, "words d_out"]:
    """Pack codes in 0..2**bits-1 along the input axis.

    Args:
        codes: the integer codes; larger values are cut to `bits` bits.
        bits: 2, 3, 4 or 8.

    Returns:
        `packed_words(d_in, bits)` rows of words.
    """
    d_in, d_out = codes.shape
    run_codes, run_words = shortest_run(bits)
    runs = -(-d_in // run_codes)
    padded = jnp.pad(codes.astype(jnp.uint32) & (2**bits - 1), ((0, runs * run_codes - d_in), (0, 0)))
    padded = padded.reshape(runs, 1, run_codes, d_out)
    # Where in each word each code begins: negative in the word before, 32 and more in one after.
    start = bits * np.arange(run_codes) - 32 * np.arange(run_words)[:, None]
    left = np.clip(start, 0, 31).astype(np.uint32)[None, :, :, None]
    right = np.clip(-start, 0, 31).astype(np.uint32)[None, :, :, None]
    inside = ((start > -bits) & (start < 32))[None, :, :, None]
    parts = jnp.where(inside, padded << left >> right, 0)
    words = jnp.sum(parts, axis=2, dtype=jnp.uint32)  # the parts share no bit
    return words.reshape(runs * run_words, d_out)[: packed_words(d_in, bits)]


def unpack(words: UInt32[Array, "words d_out"], bits: int, d_in: int) -> UInt8[Array, "d_in d_out"]:
    """The codes of `pack`; elementwise, so that XLA fuses it into what uses them.

    Args:
        words: packed along the input axis.
        bits: 2, 3, 4 or 8.
        d_in: how many codes each column holds.
    """
    d_out = words.shape[1]
    run_codes, run_words = shortest_run(bits)
    runs = -(-d_in // run_codes)
    padded = jnp.pad(words, ((0, runs * run_words - words.shape[0]), (0, 0))).reshape(runs, run_words, d_out)
    start = bits * np.arange(run_codes)
    word, shift = start // 32, (start % 32).astype(np.uint32)[None, :, None]
    low = _of_run(padded, word) >> shift
    if run_words > 1:
        cut = (start % 32 + bits > 32)[None, :, None]
        high = _of_run(padded, np.minimum(word + 1, run_words - 1)) << (32 - np.maximum(shift, 1))
        low |= jnp.where(cut, high, 0)
    codes = low & jnp.uint32(2**bits - 1)
    return codes.reshape(runs * run_codes, d_out)[:d_in].astype(jnp.uint8)


def _of_run(
    words: UInt32[Array, "runs run_words d_out"], index: Integer[np.ndarray, "run_codes"]
) -> UInt32[Array, "runs _ d_out"]:
    """The words of each run at `index`, by selection: a gather would not be fused, nor a stack."""
    found = words[:, :1]
    for word in range(1, words.shape[1]):
        found = jnp.where((index == word)[None, :, None], words[:, word : word + 1], found)
    return found
