"""The cases of tests/packed_weights.py as the kernels take them, and a problem of Llama's size on a GPU."""

import jax.numpy as jnp
import numpy as np
import packed_weights

from pallas_kernels.weight import PackedWeight, Problem

PROBLEM = Problem(
    tokens=16,
    x_dtype="bfloat16",
    d_in=4096,
    d_out=11008,
    bits=4,
    group_rows=128,
    zeros=None,
    permuted=False,
    platform="gpu",
)


def packed(case: packed_weights.Case) -> PackedWeight:
    return PackedWeight(
        codes=jnp.array(case.codes),
        scales=jnp.array(case.scales),
        zeros=None if case.zeros is None else jnp.array(case.zeros),
        group_of_row=None if case.group_of_row is None else jnp.array(case.group_of_row),
        bits=case.bits,
        group_rows=case.group_rows,
        d_in=case.weight.shape[0],
    )


def inputs(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
