"""Implementations of x @ quantized weight, on plain arrays; imports nothing of gptq_jax."""

from pallas_kernels.api import (
    IMPLEMENTATIONS,
    PreparedWeight,
    explain,
    grouped_matmul,
    prepare,
    quantized_matmul,
)
from pallas_kernels.packing import pack, unpack
from pallas_kernels.weight import PackedWeight, Problem, concatenate, describe

__all__ = [
    "IMPLEMENTATIONS",
    "PackedWeight",
    "PreparedWeight",
    "Problem",
    "concatenate",
    "describe",
    "explain",
    "grouped_matmul",
    "pack",
    "prepare",
    "quantized_matmul",
    "unpack",
]
