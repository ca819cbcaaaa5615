"""The pre-shuffled weight of the GPU kernels: each thread's codes lie where its matrix fragment needs them.

A weight of `b` bits is stored as planes (`PLANES`): 3 bits are a plane of the two low bits and one of the high
bit. A plane of `b` bits is cut into tiles of 64 outputs x 128 inputs, outputs first, each `(b, 256)` words and
contiguous. The weight is the left operand of `out.T = W.T @ x.T`: in a tile, thread `t` of 128 holds of the
m64k16 fragment of k16 step `s` (Hopper's wgmma; four m16k16 fragments of Ampere's mma) the codes of

    output 16*(t//32) + (t%32)//4 + 8*i,  input 16*s + 2*(t%4) + 8*j + h,  for i, j, h in 0..1

that is, for pair `p = i + 2*j`, two codes `h` apart that make one 32-bit register. Both lie in one word, 16
bits apart, so that one mask takes both: `place` says in which word and where. A thread's `2*b` words are in
runs of at most four, so that it reads 16 bytes at once.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Integer, UInt8

from pallas_kernels.packing import unpack
from pallas_kernels.weight import PackedWeight, Problem

TILE_N = 64
TILE_K = 128
STEPS = TILE_K // 16
WORDS = 256  # of a row of a plane

# The bits of each plane, low bits first.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

# Rows of scales that the kernels take; other groups are split into these.
GROUP_ROWS = (128, 64, 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class ShuffledWeight:
    """`weight[i, j] = (code[i, j] - 2**(bits-1) - zeros[g(i), j]) * scales[g(i), j]`, padded to whole tiles.

    In a stack of experts each array has a leading axis.

    Attributes:
        planes: `(n_padded//64 * k_padded//128 * b, 256)` words for each plane of `b` bits.
        scales: as stored, float16 or float32 (bfloat16 is widened); zero for outputs that are padding.
        zeros: zero points less the middle code; None for a symmetric grid.
        permutation: the input that each row holds; None for the order of the inputs.
        bits: 2, 3, 4 or 8. Static.
        group_rows: rows that share a row of scales: 32, 64 or 128, or `k_padded` for one scale a column. Static.
        d_in: inputs. Static.
        d_out: outputs. Static.
    """

    planes: tuple[Int32[Array, "_ 256"], ...]
    scales: Float[Array, "groups n_padded"]
    zeros: Float32[Array, "groups n_padded"] | None
    permutation: Int32[Array, "d_in"] | None
    bits: int = field(metadata={"static": True})
    group_rows: int = field(metadata={"static": True})
    d_in: int = field(metadata={"static": True})
    d_out: int = field(metadata={"static": True})

    @property
    def k_padded(self) -> int:
        """Inputs with their padding, a multiple of 128."""
        return round_up(self.d_in, TILE_K)

    @property
    def n_padded(self) -> int:
        """Outputs with their padding, a multiple of 64."""
        return round_up(self.d_out, TILE_N)

    def problem(self, x: Float[Array, "tokens d_in"]) -> Problem:
        """What is known of `x @ weight` on a GPU, by which its tiling is chosen."""
        return Problem(
            tokens=x.shape[0],
            x_dtype=x.dtype.name,
            d_in=self.d_in,
            d_out=self.d_out,
            bits=self.bits,
            group_rows=min(self.group_rows, self.d_in),
            zeros=None if self.zeros is None else "float32",
            permuted=self.permutation is not None,
            platform="gpu",
        )


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller than `size`."""
    return -(-size // multiple) * multiple


def place(plane_bits: int, step: int, pair: int) -> tuple[int, int]:
    """Which of a thread's words of a tile holds a pair of codes, and the first bit of its lower code.

    Args:
        plane_bits: 1, 2, 4 or 8.
        step: the k16 step, 0..7.
        pair: `i + 2*j`, 0..3.
    """
    per_word = 16 // plane_bits
    word, slot = divmod(4 * step + pair, per_word)
    if plane_bits == 1:  # beside the two low bits of the same code, so that one shift serves both planes
        slot = 2 * (slot % 8) + slot // 8
    return word, plane_bits * slot


def kernel_group_rows(group_rows: int, d_in: int) -> int | None:
    """Rows to a row of scales as the kernels take them: 32, 64, 128, or all; None where groups don't divide so."""
    if group_rows >= d_in:
        return round_up(d_in, TILE_K)
    return next((rows for rows in GROUP_ROWS if group_rows % rows == 0), None)


def shuffle(weight: PackedWeight) -> ShuffledWeight:
    """Bring a weight into this layout, wherever JAX runs; call it once, when a model is loaded.

    Args:
        weight: one, or a stack of experts, which is kept as a stack.

    Raises:
        NotImplementedError: groups that are no multiple of 32 inputs; for a stored order of inputs, groups
            that don't hold `group_rows` inputs each (but for the last), or an order that is being traced.
    """
    if kernel_group_rows(weight.group_rows, weight.d_in) is None:
        raise NotImplementedError(f"group_rows={weight.group_rows} is no multiple of 32 inputs.")
    if weight.group_of_row is not None:
        _check_order(weight)
    return _shuffle(weight) if weight.codes.ndim == 2 else _shuffle_stack(weight)


def _check_order(weight: PackedWeight) -> None:
    if isinstance(weight.group_of_row, jax.core.Tracer):
        raise NotImplementedError(
            "group_of_row is being traced, and its groups must be counted: prepare the weight first."
        )
    expected = np.minimum(weight.group_rows, weight.d_in - weight.group_rows * np.arange(weight.groups))
    for group_of_row in np.asarray(weight.group_of_row).reshape(-1, weight.d_in):
        if not np.array_equal(np.bincount(group_of_row, minlength=weight.groups), expected):
            raise NotImplementedError(
                f"the groups of group_of_row don't hold group_rows={weight.group_rows} inputs each."
            )


@jax.jit
def _shuffle(weight: PackedWeight) -> ShuffledWeight:
    codes = unpack(weight.codes, weight.bits, weight.d_in)
    permutation = None
    if weight.group_of_row is not None:
        permutation = jnp.argsort(weight.group_of_row, stable=True).astype(jnp.int32)
        codes = codes[permutation]
    rows = kernel_group_rows(weight.group_rows, weight.d_in)
    assert rows is not None
    k_padded, n_padded = round_up(weight.d_in, TILE_K), round_up(weight.d_out, TILE_N)
    codes = jnp.pad(codes, ((0, k_padded - weight.d_in), (0, n_padded - weight.d_out)))
    planes, low = [], 0
    for plane_bits in PLANES[weight.bits]:
        plane = (codes >> low) & (2**plane_bits - 1)
        planes.append(_shuffle_plane(plane.astype(jnp.uint8), plane_bits))
        low += plane_bits
    scales = weight.scales if weight.scales.dtype == jnp.float16 else weight.scales.astype(jnp.float32)
    spread = partial(_spread, repeats=max(weight.group_rows // rows, 1), shape=(k_padded // rows, n_padded))
    zeros = None
    if weight.zeros is not None:
        zeros = spread(weight.zeros.astype(jnp.float32) - 2.0 ** (weight.bits - 1))
    return ShuffledWeight(
        planes=tuple(planes),
        scales=spread(scales),
        zeros=zeros,
        permutation=permutation,
        bits=weight.bits,
        group_rows=rows,
        d_in=weight.d_in,
        d_out=weight.d_out,
    )


@jax.jit
def _shuffle_stack(weights: PackedWeight) -> ShuffledWeight:
    return jax.lax.map(_shuffle, weights)  # one after another: unpacked codes are larger than packed ones


def _spread(
    values: Float[Array, "groups d_out"], *, repeats: int, shape: tuple[int, int]
) -> Float[Array, "padded_groups n_padded"]:
    values = jnp.repeat(values, repeats, axis=0)[: shape[0]]
    return jnp.pad(values, tuple((0, size - had) for size, had in zip(shape, values.shape, strict=True)))


def _shuffle_plane(codes: UInt8[Array, "k_padded n_padded"], plane_bits: int) -> Int32[Array, "_ 256"]:
    k_tiles, n_tiles = codes.shape[0] // TILE_K, codes.shape[1] // TILE_N
    # input = (k_tile, step, j, quad, h), output = (n_tile, warp, i, octet): thread = (warp, octet, quad)
    codes = codes.reshape(k_tiles, STEPS, 2, 4, 2, n_tiles, 4, 2, 8)
    codes = codes.transpose(5, 0, 6, 8, 3, 1, 2, 7, 4)  # n_tile, k_tile, warp, octet, quad; step, j, i, h
    words, run = 2 * plane_bits, min(4, 2 * plane_bits)
    codes = codes.reshape(*codes.shape[:5], words, 32 // plane_bits)
    shifts = bit_positions(plane_bits).reshape(1, 1, 1, 1, 1, words, -1).astype(np.uint32)
    packed = jnp.sum(codes.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)  # they share no bit
    packed = packed.reshape(*packed.shape[:5], words // run, run).transpose(0, 1, 5, 2, 3, 4, 6)
    return jax.lax.bitcast_convert_type(packed.reshape(-1, WORDS), jnp.int32)


def bit_positions(plane_bits: int) -> Integer[np.ndarray, "8 2 2 2"]:
    """The first bit of each code of a thread in its word, by `(step, j, i, h)`; words follow in this order."""
    first = [[place(plane_bits, step, pair)[1] for pair in range(4)] for step in range(STEPS)]
    return np.asarray(first).reshape(STEPS, 2, 2, 1) + 16 * np.arange(2)
