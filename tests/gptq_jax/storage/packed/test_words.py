import jax.numpy as jnp
import numpy as np
import pytest
from packed_checkpoints import columns

from gptq_jax.storage.packed.words import pack_rows, pack_words, unpack_planes, unpack_rows, unpack_words
from pallas_kernels.packing import pack


@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_bit_streams(bits, count):
    codes = np.random.default_rng(bits).integers(2**bits, size=(count, 3)).astype(np.uint8)
    words = columns(codes, bits)
    np.testing.assert_array_equal(pack_words(codes, bits), words)
    np.testing.assert_array_equal(unpack_words(words, bits, count), codes)
    np.testing.assert_array_equal(pack_rows(codes.T, bits), words.T)
    np.testing.assert_array_equal(unpack_rows(np.ascontiguousarray(words.T), bits, count), codes.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_words_as_on_a_device(bits):
    codes = np.random.default_rng(0).integers(2**bits, size=(77, 5)).astype(np.uint8)
    np.testing.assert_array_equal(pack_words(codes, bits), pack(jnp.asarray(codes), bits))


def test_bits_beyond_the_last_code_are_not_read():
    words = np.full((1, 1), 0xFFFFFFF5, np.uint32)
    np.testing.assert_array_equal(unpack_words(words, 4, 1), [[5]])


def test_planes_of_three_bits():
    """Code k is 2 bits of word k // 16 and one bit of word 2."""
    codes = np.random.default_rng(3).integers(8, size=64)
    words = []
    for block in codes.reshape(2, 32):
        low = [sum(int(code & 3) << 2 * k for k, code in enumerate(half)) for half in block.reshape(2, 16)]
        words += [*low, sum(int(code >> 2) << k for k, code in enumerate(block))]
    np.testing.assert_array_equal(unpack_planes(np.array(words, np.uint32)[:, None], 3, 64)[:, 0], codes)
