import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing
from pallas_kernels.packing import SUPPORTED_BITS, packed_words

pack = jax.jit(packing.pack, static_argnames="bits")
unpack = jax.jit(packing.unpack, static_argnames=("bits", "d_in"))

# One column of `qweight` in Hugging Face's GPTQ checkpoints, worked out by hand from its bit layout.
HF_WORDS = {
    2: (np.arange(32) % 4, [0xE4E4E4E4, 0xE4E4E4E4]),
    # codes 10 and 21 are cut: 2 + 1 bits and 1 + 2 bits
    3: (np.array([1, *[0] * 9, 5, *[0] * 10, 5, *[0] * 9, 5]), [0x40000001, 0x80000001, 0xA0000002]),
    4: (np.arange(8), [0x76543210]),
    8: (np.array([0x01, 0x02, 0xFE, 0xFF, 0x10]), [0xFFFE0201, 0x00000010]),
}


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_words_are_those_of_hugging_face(bits: int) -> None:
    codes, words = HF_WORDS[bits]
    np.testing.assert_array_equal(pack(jnp.array(codes)[:, None], bits=bits)[:, 0], np.array(words, np.uint32))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    bits=st.sampled_from(SUPPORTED_BITS),
    d_in=st.sampled_from([1, 9, 31, 33, 64, 101]),
    d_out=st.sampled_from([1, 3]),
)
def test_round_trip_through_an_integer_bit_stream(data: st.DataObject, bits: int, d_in: int, d_out: int) -> None:
    rows = data.draw(st.binary(min_size=d_in * d_out, max_size=d_in * d_out))
    codes = np.frombuffer(rows, np.uint8).reshape(d_in, d_out) & (2**bits - 1)
    words = pack(jnp.array(codes), bits=bits)
    assert words.shape == (packed_words(d_in, bits), d_out)
    np.testing.assert_array_equal(words, packed_weights.pack(codes, bits))
    np.testing.assert_array_equal(unpack(words, bits=bits, d_in=d_in), codes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_codes_that_are_too_large_touch_no_other_code(bits: int) -> None:
    codes = np.zeros((40, 1), np.int32)
    codes[7] = 2**bits + 1
    expected = np.zeros((40, 1))
    expected[7] = 1
    np.testing.assert_array_equal(unpack(pack(jnp.array(codes), bits=bits), bits=bits, d_in=40), expected)
