"""The instructions that unpack, run in numpy on real words, and the registers they are put into."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from ml_dtypes import bfloat16

from pallas_kernels.mosaic_gpu import unpack
from pallas_kernels.mosaic_gpu.layout import PLANES, shuffle
from pallas_kernels.weight import PackedWeight

THREAD = np.arange(128)


def tile(bits: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The planes of one tile, and its centred codes, outputs by inputs."""
    case = packed_weights.make(128, 64, bits=bits, seed=bits)
    scales = jnp.ones((1, 64), jnp.float32)
    weight = shuffle(PackedWeight(codes=jnp.asarray(case.codes), scales=scales, bits=bits, group_rows=128, d_in=128))
    return [np.asarray(plane) for plane in weight.planes], (case.weight / case.scales).T.round()


def of_threads(plane: np.ndarray, plane_bits: int) -> list[np.ndarray]:
    """Every thread's words, as reads of `run` words a thread find them."""
    run = min(4, 2 * plane_bits)
    words = plane.view(np.uint32).reshape(-1, 128, run)
    return [words[read, :, word] for read in range(len(words)) for word in range(run)]


def numpy_instructions(dtype: Any, count: list[str]) -> unpack.Instructions:
    def both(half: Any) -> Any:
        return np.uint32(half * 0x10001) if isinstance(half, int) else half

    def shift(word: np.ndarray, right: int) -> np.ndarray:
        count.append("shift")
        return word >> np.uint32(right) if right > 0 else word << np.uint32(-right)

    def and_or(word: np.ndarray, mask: int, other: Any) -> np.ndarray:
        count.append("logic")
        return word & both(mask) | both(other)

    def and_xor(word: np.ndarray, mask: int, other: Any) -> np.ndarray:
        count.append("logic")
        return word & both(mask) ^ both(other)

    def subtract(word: np.ndarray, other: Any) -> np.ndarray:
        count.append("subtract")
        floats = np.ascontiguousarray(word)[:, None].view(dtype)
        if isinstance(other, float):
            assert float(dtype(other)) == other, "the constant must be exact"
            return floats - dtype(other)
        return floats - np.ascontiguousarray(other)[:, None].view(dtype)

    return unpack.Instructions(shift, and_or, and_xor, subtract)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "name"), [(bfloat16, "bfloat16"), (np.float16, "float16")])
def test_the_instructions_give_back_the_codes(bits: int, dtype: Any, name: str) -> None:
    planes, codes = tile(bits)
    words = [of_threads(plane, plane_bits) for plane, plane_bits in zip(planes, PLANES[bits], strict=True)]
    count: list[str] = []
    pair = unpack.pair_maker(words, bits, jnp.dtype(name), numpy_instructions(dtype, count))
    row = 16 * (THREAD // 32) + THREAD % 32 // 4
    column = 2 * (THREAD % 4)
    for step in range(8):
        for which in range(4):
            i, j = which % 2, which // 2
            found = pair(step, which).astype(np.float64)
            for h in range(2):
                np.testing.assert_array_equal(found[:, h], codes[row + 8 * i, 16 * step + column + 8 * j + h])
    # Of 64 codes: one subtraction for two, one mask (two for two planes or 8 bits as bfloat16), few shifts.
    masks = 2 if bits == 3 or (bits == 8 and name == "bfloat16") else 1
    shifts = {2: (8, 4), 3: (8 + 12, 8 + 8), 4: (24, 8), 8: (16, 16)}[bits][name == "float16"]
    assert {kind: count.count(kind) for kind in ("subtract", "logic")} == {"subtract": 32, "logic": 32 * masks}
    assert count.count("shift") <= shifts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_reading_gives_back_the_codes(bits: int) -> None:
    planes, codes = tile(bits)
    found = unpack.read_tile(tuple(jnp.asarray(plane) for plane in planes), bits)
    np.testing.assert_array_equal(np.asarray(found) - 2 ** (bits - 1), codes)


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_registers_of_the_fragments(columns: int) -> None:
    """Of wgmma's left operand: 16 rows a warp, then by k16 step, half of the columns, half of the rows."""
    mgpu = pytest.importorskip("jax.experimental.mosaic.gpu", exc_type=ImportError)
    positions = unpack.register_positions(mgpu.WGMMA_LAYOUT, (64, columns))
    assert positions.shape == (columns // 4,)
    expected = {n * columns + k for n in (0, 8) for k in range(0, columns, 8)}
    assert set(positions.tolist()) == expected
