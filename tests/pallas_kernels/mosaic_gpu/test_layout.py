"""The pre-shuffled layout, read in numpy code by code from the documented place of each."""

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest

from pallas_kernels.mosaic_gpu.layout import PLANES, ShuffledWeight, kernel_group_rows, shuffle
from pallas_kernels.weight import PackedWeight

BITS = (2, 3, 4, 8)


def packed(case: packed_weights.Case, d_in: int) -> PackedWeight:
    return PackedWeight(
        codes=jnp.asarray(case.codes),
        scales=jnp.asarray(case.scales),
        zeros=None if case.zeros is None else jnp.asarray(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.asarray(case.group_of_row),
        bits=case.bits,
        group_rows=case.group_rows,
        d_in=d_in,
    )


def read_plane(plane: np.ndarray, plane_bits: int, k_padded: int, n_padded: int) -> np.ndarray:
    """Codes (inputs, outputs) of a plane."""
    row, column = np.meshgrid(np.arange(n_padded), np.arange(k_padded), indexing="ij")
    n, k = row % 64, column % 128
    thread = 32 * (n // 16) + 4 * (n % 8) + (k % 8) // 2
    step, j, i, h = k // 16, (k // 8) % 2, (n // 8) % 2, k % 2
    slot = 4 * step + i + 2 * j
    word, slot = slot // (16 // plane_bits), slot % (16 // plane_bits)
    if plane_bits == 1:
        slot = 2 * (slot % 8) + slot // 8
    run = min(4, 2 * plane_bits)
    in_tile = (word // run) * 128 * run + run * thread + word % run
    tile = (row // 64) * (k_padded // 128) + column // 128
    words = plane.view(np.uint32).reshape(-1)[tile * 256 * plane_bits + in_tile]
    return ((words >> (plane_bits * slot + 16 * h)) & (2**plane_bits - 1)).T


def read(weight: ShuffledWeight) -> np.ndarray:
    """The float64 weight with its padding, in the order of the rows."""
    codes, low = np.zeros((weight.k_padded, weight.n_padded)), 0
    for plane, plane_bits in zip(weight.planes, PLANES[weight.bits], strict=True):
        codes += 2.0**low * read_plane(np.asarray(plane), plane_bits, weight.k_padded, weight.n_padded)
        low += plane_bits
    group = np.arange(weight.k_padded) // weight.group_rows
    zeros = 0.0 if weight.zeros is None else np.asarray(weight.zeros, np.float64)[group]
    return (codes - 2.0 ** (weight.bits - 1) - zeros) * np.asarray(weight.scales, np.float64)[group]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("d_in", "d_out", "group_size", "symmetric", "permuted"),
    [
        (128, 64, 128, True, False),
        (576, 192, 128, False, False),  # the last group is half a group
        (576, 100, 64, True, True),
        (320, 129, 32, False, True),
        (300, 7, -1, False, False),
        (768, 64, 384, False, False),  # a group is three rows of scales
        (416, 64, 96, True, True),
    ],
)
def test_every_code_scale_and_zero_is_in_its_place(
    bits: int, d_in: int, d_out: int, group_size: int, symmetric: bool, permuted: bool
) -> None:
    case = packed_weights.make(
        d_in, d_out, bits=bits, group_size=group_size, symmetric=symmetric, permuted=permuted, real_zeros=bits == 3
    )
    weight = shuffle(packed(case, d_in))
    assert weight.k_padded % 128 == 0
    assert weight.n_padded % 64 == 0
    for plane, plane_bits in zip(weight.planes, PLANES[bits], strict=True):
        assert plane.shape == (weight.k_padded * weight.n_padded * plane_bits // 32 // 256, 256)
    order = np.arange(d_in) if weight.permutation is None else np.asarray(weight.permutation)
    assert (weight.permutation is not None) == permuted
    np.testing.assert_array_equal(np.sort(order), np.arange(d_in))
    np.testing.assert_allclose(read(weight)[:d_in, :d_out], case.weight[order], rtol=1e-6, atol=1e-6)
    assert not np.asarray(weight.scales)[:, d_out:].any()


def test_scales_keep_what_they_hold() -> None:
    case = packed_weights.make(256, 64, group_size=128)
    for stored, kept in ((jnp.float16, jnp.float16), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)):
        scales = jnp.asarray(case.scales).astype(stored)
        weight = packed(case, 256)
        found = shuffle(PackedWeight(codes=weight.codes, scales=scales, bits=4, group_rows=128, d_in=256)).scales
        assert found.dtype == kept
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(scales, np.float32))


@pytest.mark.parametrize(
    ("group_rows", "d_in", "rows"),
    [
        (128, 4096, 128),
        (64, 4096, 64),
        (32, 576, 32),
        (4096, 4096, 4096),
        (576, 576, 640),
        (256, 4096, 128),
        (24, 96, None),
    ],
)
def test_rows_to_a_row_of_scales(group_rows: int, d_in: int, rows: int | None) -> None:
    assert kernel_group_rows(group_rows, d_in) == rows


def test_what_it_declines() -> None:
    with pytest.raises(NotImplementedError, match="group_rows=48 is no multiple of 32"):
        shuffle(packed(packed_weights.make(96, 64, group_size=48), 96))
    case = packed_weights.make(256, 64, group_size=64)
    uneven = case._replace(group_of_row=np.minimum(np.arange(256) // 60, 3).astype(np.int32))
    with pytest.raises(NotImplementedError, match="don't hold group_rows=64 inputs each"):
        shuffle(packed(uneven, 256))
    ordered = packed(packed_weights.make(256, 64, group_size=64, permuted=True), 256)
    with pytest.raises(NotImplementedError, match="prepare the weight first"):
        jax.jit(shuffle)(ordered)


def test_a_whole_matrix_takes_one_compilation() -> None:
    weight = packed(packed_weights.make(1024, 512, group_size=128), 1024)
    lowered = jax.jit(shuffle).lower(weight)
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 4 * weight.codes.nbytes
