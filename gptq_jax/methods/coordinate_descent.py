"""Coordinate descent on the codes of a solved weight, its grid fixed (as in QuantEase, arXiv 2309.01885, eq. 8).

With the error D = W - Q and all other inputs fixed, the loss tr(D^T H D) is least where input i is as near as its grid
allows to Q_i + (H D)_i / H_ii. Inputs are visited in blocks; what all others add to a block is one matrix product.
"""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_jax import grids
from gptq_jax.methods.base import Method, Solution, Stats, with_hessian
from gptq_jax.methods.gptq import gptq
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import pack, unpack

_BLOCK = 32  # inputs visited one by one between two matrix products


@lru_cache  # the same functions for the same options, so that jit knows them again
def coordinate_descent(method: Method | None = None, *, passes: int = 2, damping: float = 0.01) -> Method:
    """Solve by another method, then improve its codes, input by input, while that lowers the layer's loss.

    Assumes that the loss on the calibration's inputs is what matters: it is fitted more closely than by the method
    alone. Below a correction, `qep(coordinate_descent(gptq()))`, the corrected weight is what codes are moved towards.

    Args:
        method: makes codes and grid; `gptq()` if None.
        passes: how often every input is visited.
        damping: fraction of the Hessian's mean diagonal added to it.
    """
    if passes < 1:
        raise ValueError(f"passes={passes} must be positive: use 1 or 2, or the method alone.")
    chosen = gptq() if method is None else method
    if chosen.needs_float_inputs:
        raise ValueError(
            f"method {chosen.name!r} solves a corrected weight that is not known here: put coordinate descent inside, "
            "as in qep(coordinate_descent(gptq()))."
        )
    solver = with_hessian(chosen)
    assert solver.hessian is not None  # with_hessian saw to it
    hessian_of = solver.hessian

    def solve(weight: Float[Array, "d_in d_out"], stats: Stats, spec: QuantSpec) -> Solution:
        solution = solver.solve(weight, stats, spec)
        tensor, notes = solution if isinstance(solution, Solution) else (solution, {})
        return Solution(descend(weight, hessian_of(stats), tensor, passes, damping), notes)

    settings = (*chosen.settings, ("coordinate_descent", passes))
    return solver._replace(solve=solve, settings=settings)


def descend(
    weight: Float[Array, "d_in d_out"],
    hessian: Float[Array, "d_in d_in"],
    tensor: QuantizedTensor,
    passes: int,
    damping: float,
) -> QuantizedTensor:
    """`tensor` with codes whose loss is no higher, after visiting every input `passes` times."""
    spec, d_in = tensor.spec, tensor.d_in
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    # An input that never fired costs nothing: any positive curvature rounds its weights to nearest.
    hessian = hessian + jnp.diag(jnp.where(diagonal == 0, 1.0, damping * jnp.mean(diagonal)))
    group_rows = spec.group_rows(d_in)
    group = jnp.arange(d_in) // group_rows if tensor.group_of_row is None else tensor.group_of_row
    grid = grids.grid_of(tensor)

    # Whole blocks only: inputs of weight zero and curvature one, which start at error zero and stay there.
    size = min(_BLOCK, d_in)
    padding = -d_in % size
    ones = jnp.diag((jnp.arange(d_in + padding) >= d_in).astype(jnp.float32))
    hessian = jnp.pad(hessian, ((0, padding), (0, padding))) + ones
    group = jnp.pad(group, (0, padding))
    wide = jnp.pad(weight.astype(jnp.float32), ((0, padding), (0, 0)))
    codes = jnp.pad(unpack(tensor.codes, spec.bits, d_in).astype(jnp.float32), ((0, padding), (0, 0)))
    values = grids.dequantize(codes, jax.tree.map(lambda leaf: leaf[group], grid))
    errors = jnp.where((jnp.arange(d_in + padding) < d_in)[:, None], wide - values, 0.0)

    def visit(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, codes = carry
        at = k % (hessian.shape[0] // size) * size
        rows = jax.lax.dynamic_slice_in_dim(hessian, at, size)
        square = jax.lax.dynamic_slice_in_dim(rows, at, size, axis=1)
        slope = jnp.matmul(rows, errors, precision="highest")
        target = jax.lax.dynamic_slice_in_dim(wide, at, size)
        homes = jax.lax.dynamic_slice_in_dim(group, at, size)

        def step(j: Array, inside: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            slope, errors, codes = inside
            own = jax.tree.map(lambda leaf: leaf[homes[j]], grid)
            wanted = target[j] - errors[j] + slope[j] / square[j, j]
            code = jnp.clip(jnp.round(wanted / own.scale + own.zero), 0, spec.max_code)  # zeros may be fractions
            error = target[j] - grids.dequantize(code, own)
            slope = slope + square[j][:, None] * (error - errors[j])[None]
            return slope, errors.at[j].set(error), codes.at[j].set(code)

        here = [jax.lax.dynamic_slice_in_dim(leaf, at, size) for leaf in (errors, codes)]
        _, *moved = jax.lax.fori_loop(0, size, step, (slope, *here))
        errors, codes = (
            jax.lax.dynamic_update_slice_in_dim(leaf, new, at, axis=0) for leaf, new in zip(carry, moved, strict=True)
        )
        return errors, codes

    _, codes = jax.lax.fori_loop(0, passes * (hessian.shape[0] // size), visit, (errors, codes))
    return replace(tensor, codes=pack(codes[:d_in].astype(jnp.uint8), spec.bits))
