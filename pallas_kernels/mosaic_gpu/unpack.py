"""A tile's words -> matrix fragments of codes less the middle one, two codes of bfloat16 or float16 a register.

With `m` bits of mantissa, the bits of `2**(m-r)` or'ed with a code at bit `r` are the number `2**(m-r) + code`:
one `lop3` makes two codes floating, one subtraction centres them, both exactly, and a shift serves all codes of
a word that end within the mantissa. (Kim et al., "Who Says Elephants Can't Run", 2022, arXiv:2211.10017.)

Machine instructions cannot be interpreted: then plain jnp reads the same words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels.mosaic_gpu import compat
from pallas_kernels.mosaic_gpu.layout import PLANES, STEPS, TILE_K, TILE_N, WORDS, place

_MANTISSA = {"bfloat16": 7, "float16": 10}


def load_tile(refs: Sequence[Any], tile: int, bits: int) -> tuple[Int32[Array, "_ 256"], ...]:
    """A thread's words of each plane of tile number `tile` in shared memory.

    Args:
        refs: one for each plane, `(tiles * plane_bits, 256)`.
        tile: static.
        bits: of a code.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return tuple(
        plgpu.load(ref.at[pl.ds(tile * plane_bits, plane_bits)], layout=_words_layout(plane_bits))
        for ref, plane_bits in zip(refs, PLANES[bits], strict=True)
    )


def unpack_tile(
    words: tuple[Int32[Array, "_ 256"], ...], *, bits: int, dtype: Any, columns: int, layout: Any
) -> tuple[Float[Array, "64 _"], ...]:
    """The codes of a tile less `2**(bits-1)`, as `128 // columns` arrays of 64 outputs x `columns` inputs.

    Args:
        words: of `load_tile`.
        bits: 2, 3, 4 or 8.
        dtype: bfloat16 or float16.
        columns: 16, 32, 64 or 128.
        layout: `plgpu.Layout.WGMMA` or `plgpu.Layout.MMA_LHS(dtype)`.
    """
    pieces = range(TILE_K // columns)
    return tuple(unpack_piece(words, k, bits=bits, dtype=dtype, columns=columns, layout=layout) for k in pieces)


def unpack_piece(
    words: tuple[Int32[Array, "_ 256"], ...], piece: int, *, bits: int, dtype: Any, columns: int, layout: Any
) -> Float[Array, "64 _"]:
    """One of the arrays of `unpack_tile`, for kernels that unpack one while another is being multiplied."""
    if compat.interpreting():
        codes = read_tile(words, bits)[:, piece * columns : (piece + 1) * columns]
        return (codes.astype(jnp.float32) - 2.0 ** (bits - 1)).astype(dtype)
    return _inline_unpack(bits, jnp.dtype(dtype), piece, columns, layout)(*words)


def read_tile(words: tuple[Int32[Array, "_ 256"], ...], bits: int) -> Int32[Array, "64 128"]:
    """The codes of a tile, outputs by inputs, in plain jnp."""
    codes, low = jnp.zeros((TILE_N, TILE_K), jnp.int32), 0
    for plane, plane_bits in zip(words, PLANES[bits], strict=True):
        run = min(4, 2 * plane_bits)
        of_thread = plane.reshape(-1, 4, 8, 4, run).transpose(1, 2, 3, 0, 4)  # warp, octet, quad; word
        per_word = 32 // plane_bits
        code = jax.lax.broadcasted_iota(jnp.int32, (4, 8, 4, 2 * plane_bits, per_word), 4)  # constants are no use here
        slot = code // 2
        if plane_bits == 1:
            slot = 2 * (slot % 8) + slot // 8
        shifted = jax.lax.shift_right_logical(
            jnp.broadcast_to(of_thread.reshape(4, 8, 4, -1, 1), code.shape), plane_bits * slot + 16 * (code % 2)
        )
        fields = (shifted & (2**plane_bits - 1)).reshape(4, 8, 4, STEPS, 2, 2, 2)  # ..., step, j, i, h
        codes |= fields.transpose(0, 5, 1, 3, 4, 2, 6).reshape(TILE_N, TILE_K) << low
        low += plane_bits
    return codes


def register_positions(layout: Any, shape: tuple[int, int]) -> Integer[np.ndarray, "_"]:
    """For each register of thread 0 in the tiled `layout`, in order, the flat index of its first element."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, inner = index.shape[: index.ndim - len(tile)], index.shape[index.ndim - len(tile) :]
        split = [part for size, of_tile in zip(inner, tile, strict=True) for part in (size // of_tile, of_tile)]
        axes = [len(outer) + 2 * i for i in range(len(tile))]
        order = (*range(len(outer)), *axes, *(axis + 1 for axis in axes))
        index = index.reshape(*outer, *split).transpose(order)
    first = [slice(None)] * index.ndim
    for axis in (*layout.warp_dims, *layout.lane_dims, layout.vector_dim):
        if isinstance(axis, int):  # else replicated
            first[axis] = slice(0, 1)
    return index[tuple(first)].reshape(-1)


def _words_layout(plane_bits: int) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.Layout.WG_STRIDED((plane_bits, WORDS), vec_size=min(4, 2 * plane_bits))


def _inline_unpack(bits: int, dtype: jnp.dtype, piece: int, columns: int, layout: Any) -> Callable[..., Any]:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    shape = (TILE_N, columns)

    @plgpu.inline_mgpu(
        arg_types=tuple(_words_layout(plane_bits) for plane_bits in PLANES[bits]),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def unpack(_: Any, *planes: Any) -> Any:
        words = [
            [
                vector.extract(register, [], [word])
                for register in plane.registers.flat
                for word in range(ir.VectorType(register.type).shape[0])
            ]
            for plane in planes
        ]
        pair = pair_maker(words, bits, dtype, _machine(dtype))
        fragments = layout.to_mgpu()
        rows, inputs = np.divmod(register_positions(fragments, shape), columns)
        inputs += piece * columns
        registers = np.empty(len(rows), dtype=object)
        registers[:] = [
            pair(k // 16, n // 8 + 2 * (k % 16 // 8)) for n, k in zip(rows.tolist(), inputs.tolist(), strict=True)
        ]
        return mgpu.FragmentedArray(
            _registers=registers.reshape(fragments.registers_shape(shape)), _layout=fragments, _is_signed=None
        )

    return unpack


class Instructions(NamedTuple):
    """What the unpacking of a register is made of; a test puts numpy in place of the machine's.

    Attributes:
        shift: (word, places to the right, or to the left where negative) -> word.
        and_or: (word, mask, word or pattern) -> `word & mask | other`; masks and patterns are of 16 bits, and
            used for both halves.
        and_xor: the same with `^`.
        subtract: (word, word or number) -> the difference of its two floats.
    """

    shift: Callable[[Any, int], Any]
    and_or: Callable[[Any, int, Any], Any]
    and_xor: Callable[[Any, int, Any], Any]
    subtract: Callable[[Any, Any], Any]


def pair_maker(words: list[list[Any]], bits: int, dtype: Any, run: Instructions) -> Callable[[int, int], Any]:
    """The instructions that unpack: (step, pair) -> the register of its two centred codes.

    Args:
        words: a thread's, of each plane.
        bits: 2, 3, 4 or 8.
        dtype: bfloat16 or float16.
        run: what emits or computes them.
    """
    dtype = jnp.dtype(dtype)
    mantissa, planes = _MANTISSA[dtype.name], PLANES[bits]
    shifts: dict[tuple[int, int, int], Any] = {}

    def shifted(plane: int, word: int, right: int) -> Any:
        if right == 0:
            return words[plane][word]
        if (plane, word, right) not in shifts:
            shifts[plane, word, right] = run.shift(words[plane][word], right)
        return shifts[plane, word, right]

    def pair(step: int, which: int) -> Any:
        word, first = place(planes[0], step, which)
        if bits > mantissa:  # 8 bits as bfloat16: 128 + the low seven, less 128 or 256 as the high one says
            source = shifted(0, word, first)
            low = run.and_or(source, 0x7F, _pattern(128.0, dtype))
            return run.subtract(low, run.and_xor(source, 0x80, _pattern(256.0, dtype)))
        served = planes[0] * ((mantissa - bits) // planes[0] + 1)  # bits that one shift serves
        right = first // served * served
        at = first - right
        one = 2.0 ** (mantissa - at)
        code = run.and_or(shifted(0, word, right), (2 ** planes[0] - 1) << at, _pattern(one, dtype))
        if len(planes) > 1:
            word, first = place(planes[1], step, which)
            at += planes[0]
            code = run.and_or(shifted(1, word, first - at), 1 << at, code)
        return run.subtract(code, one + 2.0 ** (bits - 1))

    return pair


def _machine(dtype: jnp.dtype) -> Instructions:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith as typed_arith
    from jaxlib.mlir.dialects import llvm

    arith: Any = typed_arith  # its stubs know less than it takes
    i32 = ir.IntegerType.get_signless(32)
    element = ir.BF16Type.get() if dtype.name == "bfloat16" else ir.F16Type.get()
    floats = ir.VectorType.get((2,), element)

    def shift(word: Any, right: int) -> Any:
        places = arith.constant(i32, ir.IntegerAttr.get(i32, abs(right)))
        return (arith.shrui if right > 0 else arith.shli)(word, places)

    def logic(table: str) -> Callable[[Any, int, Any], Any]:
        # In assembly, since the compiler would take the constants of two operations apart.
        def emit(word: Any, mask: int, other: Any) -> Any:
            if isinstance(other, int):
                code = f"lop3.b32 $0, $1, {mask * 0x10001:#010x}, {other * 0x10001:#010x}, {table};"
                return llvm.inline_asm(i32, [word], code, "=r,r")
            code = f"lop3.b32 $0, $1, {mask * 0x10001:#010x}, $2, {table};"
            return llvm.inline_asm(i32, [word, other], code, "=r,r,r")

        return emit

    def subtract(word: Any, other: Any) -> Any:
        if isinstance(other, float):
            splat = ir.DenseElementsAttr.get_splat(floats, ir.FloatAttr.get(element, other))
            return arith.subf(llvm.bitcast(floats, word), arith.constant(floats, splat))
        return arith.subf(llvm.bitcast(floats, word), llvm.bitcast(floats, other))

    return Instructions(shift, logic("(0xf0 & 0xcc) | 0xaa"), logic("(0xf0 & 0xcc) ^ 0xaa"), subtract)


def _pattern(value: float, dtype: jnp.dtype) -> int:
    return int(np.asarray(value, dtype).view(np.uint16))
