"""Each layout against weights written bit by bit, and its inverse where there is one."""

import jax.numpy as jnp
import numpy as np
import pytest
from packed_checkpoints import awq_tensors, columns, compressed_tensors, gptq_tensors, random_module

from gptq_jax.spec import QuantSpec
from gptq_jax.storage.packed import awq, gptq
from gptq_jax.storage.packed import compressed_tensors as ct
from gptq_jax.storage.packed.base import module_grid, quantized_tensor
from gptq_jax.tensor import QuantizedTensor, validate

GRIDS = [(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (16, 48, -1) for symmetric in (True, False)]


def decoded(form, arrays, spec, d_in, d_out, **version):
    codes = {gptq: gptq.CODES, ct: ct.CODES, awq: "qweight"}[form]
    layout = form.layout(spec, d_in, d_out)
    for suffix, values in arrays.items():
        assert values.shape in layout[suffix].shapes
    assert {suffix for suffix, stored in layout.items() if not stored.optional} <= set(arrays)
    grid = form.read_grid(arrays, spec, d_in, d_out, **version)
    tensor = quantized_tensor(grid, form.read_codes(arrays[codes], spec, d_in, d_out, **version), d_in)
    validate(tensor)
    return tensor, grid.notes


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for suffix, values in expected.items():
        assert found[suffix].dtype == values.dtype, suffix
        np.testing.assert_array_equal(found[suffix], values, err_msg=suffix)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_gptq(bits, group_size, symmetric, version):
    """Zero points of 0 are among them: in v1 they borrow from their neighbours in the word."""
    parts = random_module(np.random.default_rng(0), 96, 64, bits, group_size, symmetric)
    *module, weight = parts
    module[1] = np.where(module[1] == 0, 1, module[1]) if bits == 3 and version == "gptq" else module[1]
    weight = (module[0] - module[1][module[3]]) * module[2].astype(np.float64)[module[3]]
    arrays = gptq_tensors(*module, bits, version)
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    tensor, notes = decoded(gptq, arrays, spec, 96, 64, version=version)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)
    assert (tensor.spec, tensor.group_of_row, notes) == (spec, None, ())
    assert (tensor.zeros is None) == symmetric
    assert_same_bits(gptq.encode(tensor, version=version), arrays)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v1_borrows_across_fields(bits):
    """A zero point of 0 in every place of a word, d_out filling no whole number of words."""
    zeros = np.array([[0, 1, 0, 2, 3, 0, 1, 1, 0, 0, 1]], np.uint8)
    words = gptq.pack_zeros(zeros, bits, version="gptq")
    as_integers = columns(zeros.T, bits).T.astype(object) - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    np.testing.assert_array_equal(words.astype(object), as_integers % 2**32)
    np.testing.assert_array_equal(gptq.unpack_zeros(words, bits, 11, version="gptq"), zeros)


def test_v1_of_three_bits_wraps_in_its_field():
    zeros = np.arange(32, dtype=np.uint8)[None] % 8
    words = gptq.pack_zeros(zeros, 3, version="gptq")
    np.testing.assert_array_equal(words, columns((zeros.T.astype(int) - 1) % 8, 3).T)
    np.testing.assert_array_equal(gptq.unpack_zeros(words, 3, 32, version="gptq"), zeros)


@pytest.mark.parametrize(("bits", "stored"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_v1_as_everybody_writes_it(bits, stored):
    words = gptq.pack_zeros(np.full((1, 32), 2 ** (bits - 1), np.uint8), bits, version="gptq")
    assert (words == stored).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_in_name_only(bits):
    """Some files claim v1 and store true zeros; where the grid is symmetric, the data tells."""
    *module, weight = random_module(np.random.default_rng(0), 32, 32, bits, 16, True)
    spec = QuantSpec(bits=bits, group_size=16, symmetric=True)
    tensor, notes = decoded(gptq, gptq_tensors(*module, bits, "gptq_v2"), spec, 32, 32, version="gptq")
    assert notes == ("claims gptq v1 but stores true zeros",)
    assert tensor.zeros is None
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)


def test_symmetric_in_name_only():
    *module, weight = random_module(np.random.default_rng(0), 32, 32, 4, 16, False)
    spec = QuantSpec(bits=4, group_size=16, symmetric=True)
    tensor, (note,) = decoded(gptq, gptq_tensors(*module, 4, "gptq_v2"), spec, 32, 32, version="gptq_v2")
    assert note == "is symmetric by its config, but stores zero points of 0 to 15, not 8"
    assert not tensor.spec.symmetric
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)


def test_any_order_of_groups():
    *module, weight = random_module(np.random.default_rng(0), 96, 32, 4, 16, False, ordered=False)
    arrays = gptq_tensors(*module, 4, "gptq_v2")
    spec = QuantSpec(bits=4, group_size=16, symmetric=False)
    tensor, notes = decoded(gptq, arrays, spec, 96, 32, version="gptq_v2")
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)
    assert notes == ("non-monotone g_idx (activation order)",)
    assert_same_bits(gptq.encode(tensor, version="gptq_v2"), arrays)
    uneven = {**arrays, "g_idx": np.sort(np.random.default_rng(1).integers(6, size=96)).astype(np.int32)}
    tensor, notes = decoded(gptq, uneven, spec, 96, 32, version="gptq_v2")
    assert notes == ("monotone g_idx other than i // group_size",)
    np.testing.assert_array_equal(tensor.group_of_row, uneven["g_idx"])
    del arrays["g_idx"]
    assert decoded(gptq, arrays, spec, 96, 32, version="gptq_v2")[0].group_of_row is None


def test_planar_codes():
    """The words of two bit planes, from the same codes."""
    codes, zeros, scales, group, weight = random_module(np.random.default_rng(0), 64, 32, 3, 32, False)

    def planes(values):
        blocks = values.reshape(-1, 32, values.shape[1])
        return np.concatenate([np.concatenate([columns(b & 3, 2), columns(b >> 2, 1)]) for b in blocks])

    arrays = {"qweight": planes(codes), "qzeros": planes(zeros.T).T, "scales": scales, "g_idx": group}
    spec = QuantSpec(bits=3, group_size=32, symmetric=False)
    tensor, _ = decoded(gptq, arrays, spec, 64, 32, version="gptq_p")
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("d_out", [64, 50])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_compressed_tensors(bits, group_size, symmetric, d_out):
    codes, zeros, scales, _, weight = random_module(np.random.default_rng(0), 96, d_out, bits, group_size, symmetric)
    arrays = compressed_tensors(codes, zeros, scales, bits, symmetric)
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    tensor, notes = decoded(ct, arrays, spec, 96, d_out)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)
    assert notes == ()
    assert_same_bits(ct.encode(tensor), arrays)


def test_three_bits_ten_to_a_word():
    """compressed-tensors before 0.18: code k is bits 3 * (k % 10) of word k // 10."""
    codes, zeros, scales, _, weight = random_module(np.random.default_rng(0), 96, 64, 3, 16, False)

    def tens(values):
        words = np.zeros((-(-len(values) // 10), values.shape[1]), np.uint32)
        for k, row in enumerate(values.astype(np.uint32)):
            words[k // 10] |= row << np.uint32(3 * (k % 10))
        return words

    arrays = {
        **compressed_tensors(codes, zeros, scales, 3, False),
        "weight_packed": np.ascontiguousarray(tens(codes).T),
        "weight_zero_point": tens(zeros.T),
    }
    tensor, _ = decoded(ct, arrays, QuantSpec(bits=3, group_size=16, symmetric=False), 96, 64)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)


def test_compressed_tensors_order_of_groups():
    codes, zeros, scales, group, weight = random_module(np.random.default_rng(0), 32, 16, 4, 16, True, ordered=False)
    arrays = {**compressed_tensors(codes, zeros, scales, 4, True), "weight_g_idx": group.astype(np.int32)}
    spec = QuantSpec(bits=4, group_size=16)
    tensor, _ = decoded(ct, arrays, spec, 32, 16)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)
    with pytest.raises(ValueError, match="activation order"):
        ct.encode(tensor)
    unordered = {**arrays, "weight_g_idx": np.full(32, -1, np.int32)}
    assert decoded(ct, unordered, spec, 32, 16)[0].group_of_row is None


@pytest.mark.parametrize("d_in", [96, 100, 2060])
def test_awq(d_in):
    codes, zeros, scales, _, weight = random_module(np.random.default_rng(0), d_in, 48, 4, 16, False)
    spec = QuantSpec(bits=4, group_size=16, symmetric=False)
    tensor, _ = decoded(awq, awq_tensors(codes, zeros, scales), spec, d_in, 48)
    np.testing.assert_allclose(tensor.dequantize(), weight, rtol=1e-6)


def test_awq_needs_whole_words():
    with pytest.raises(ValueError, match="has 20 outputs, but AWQ packs 8 at a time"):
        awq.layout(QuantSpec(), 32, 20)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_are_finite(value):
    scales = np.ones((2, 4), np.float16)
    scales[1, 2] = value
    with pytest.raises(ValueError, match="1 of 8 scales are NaN or infinity"):
        module_grid(QuantSpec(group_size=16), 32, scales=scales, zeros=None)


@pytest.mark.parametrize(("group", "spans"), [([0, 2], "0 to 2"), ([-1, 0], "-1 to 0")])
def test_groups_are_in_range(group, spans):
    rows = np.repeat(np.array(group, np.int32), 16)
    with pytest.raises(ValueError, match=f"g_idx spans {spans}, but there are 2 groups"):
        module_grid(QuantSpec(group_size=16), 32, scales=np.ones((2, 4), np.float16), zeros=None, group_of_row=rows)


def tensor_of(d_in=32, d_out=32, *, bits=4, group_size=16, zeros=None, scales=1.0, dtype=jnp.float16):
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=zeros is None)
    groups = spec.groups(d_in)
    return QuantizedTensor(
        codes=jnp.zeros((-(-d_in * bits // 32), d_out), jnp.uint32),
        scales=jnp.full((groups, d_out), scales, dtype),
        zeros=None if zeros is None else jnp.full((groups, d_out), zeros),
        group_of_row=None,
        spec=spec,
        d_in=d_in,
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tensor_of(40, 32, bits=3), "multiples of 32, not 40 inputs and 32 outputs"),
        (tensor_of(32, 40, bits=3), "multiples of 32, not 32 inputs and 40 outputs"),
        (tensor_of(scales=0.1, dtype=jnp.float32), "float32 scales are not float16 numbers"),
        (tensor_of(scales=1e30, dtype=jnp.bfloat16), "bfloat16 scales are not float16 numbers"),
        (tensor_of(zeros=jnp.float32(7.5)), "zero points are float32 up to 7.5, not integers of 4 bits"),
        (tensor_of(zeros=jnp.uint8(16)), "zero points are uint8 up to 16"),
    ],
)
def test_gptq_refuses_what_it_cannot_hold(tensor, message):
    with pytest.raises(ValueError, match=message):
        gptq.encode(tensor, version="gptq_v2")


def test_versions_that_are_only_read():
    with pytest.raises(ValueError, match="version 'gptq_p' cannot be written"):
        gptq.encode(tensor_of(), version="gptq_p")


def test_compressed_tensors_needs_whole_groups():
    with pytest.raises(ValueError, match="40 inputs are no multiple of the group size 16"):
        ct.encode(tensor_of(40))
