"""Packed weights made from a seed, with their float64 values: numpy and Python integers only."""

from typing import NamedTuple

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [d_in, d_out] as words [words, d_out]: each column is one long integer, cut into 32 bits."""
    d_in, d_out = codes.shape
    words = -(-d_in * bits // 32)
    packed = np.zeros((words, d_out), np.uint32)
    for column in range(d_out):
        stream = sum(int(code) << (bits * k) for k, code in enumerate(codes[:, column]))
        packed[:, column] = [stream >> (32 * word) & 0xFFFFFFFF for word in range(words)]
    return packed


class Case(NamedTuple):
    """A packed weight and what it stands for.

    `magnitude` is (code + zero) * scale: times eps and |x|, a bound on rounding in any order of summation.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    group_of_row: np.ndarray | None
    bits: int
    group_rows: int
    weight: np.ndarray
    magnitude: np.ndarray


def make(
    d_in: int,
    d_out: int,
    *,
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    permuted: bool = False,
    real_zeros: bool = False,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    group_rows = d_in if group_size == -1 else min(group_size, d_in)
    groups = -(-d_in // group_rows)
    codes = rng.integers(0, 2**bits, (d_in, d_out))
    scales = rng.uniform(0.25, 1.0, (groups, d_out)).astype(np.float32)
    if symmetric:
        zeros = None
    elif real_zeros:
        zeros = rng.uniform(-1, 2**bits, (groups, d_out)).astype(np.float32)
    else:
        zeros = rng.integers(0, 2**bits, (groups, d_out)).astype(np.uint8)
    group_of_row = np.arange(d_in) // group_rows
    if permuted:
        group_of_row = rng.permutation(group_of_row)
    row_zeros = 2.0 ** (bits - 1) if zeros is None else zeros.astype(np.float64)[group_of_row]
    row_scales = scales.astype(np.float64)[group_of_row]
    return Case(
        codes=pack(codes, bits),
        scales=scales,
        zeros=zeros,
        group_of_row=group_of_row.astype(np.int32) if permuted else None,
        bits=bits,
        group_rows=group_rows,
        weight=(codes - row_zeros) * row_scales,
        magnitude=(codes + np.abs(row_zeros)) * row_scales,
    )


def assert_product(y: np.ndarray, x: np.ndarray, case: Case, eps: float = 2.0**-23) -> None:
    """`y == x @ weight` within the rounding of sums in float32 (and of the result, where `eps` is larger)."""
    x64 = np.asarray(x, np.float64)
    exact = x64 @ case.weight
    bound = 4 * 2.0**-23 * (np.abs(x64) @ case.magnitude) + eps * np.abs(exact)
    np.testing.assert_array_less(np.abs(np.asarray(y, np.float64) - exact), bound + 1e-30)
