"""HQQ, half-quadratic quantization (Badri and Shaji 2023, Mobius Labs, "Half-Quadratic Quantization of Large Models").

No calibration: the grid is fitted to the weights alone, by a norm below one, which forgives outliers. An auxiliary
error E splits min_z sum |W - Q|^p into two steps that are solved exactly, in turn, as beta grows:
    E <- shrink(W - Q) = sign(W - Q) relu(|W - Q| - |W - Q|^(p-1) / beta)
    z <- mean over the group of code - (W - E) / scale
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptq_jax import grids
from gptq_jax.methods.base import LayerBatch, Method, assemble
from gptq_jax.methods.rtn import split_groups
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

_BETA, _GROWTH = 10.0, 1.01  # of the authors' code


@lru_cache  # the same functions for the same options, so that jit knows them again
def hqq(grid: str = "minmax", *, norm: float = 0.7, iterations: int = 20) -> Method:
    """Fit zero points, which become fractions, to the weights by half-quadratic splitting, and round to nearest.

    A symmetric grid has no zero point to fit: its scale is fitted by the same splitting, scale <- <q, W - E> / <q, q>
    with q = code - middle, which the authors do not do. Assumes that all inputs matter alike. Zero points are stored in
    `scale_dtype`; formats of other tools have none like them.

    Args:
        grid: that it starts from, "minmax" as the authors do, or "mse", which is better at 2 and 3 bits.
        norm: the power p of the error, in (0, 1].
        iterations: of the two steps. For each group and output the grid with the least error of all is kept, so that
            none is worse than rounding to nearest by that norm.
    """
    if grid not in ("minmax", "mse"):
        raise ValueError(f"grid={grid!r} does not go without calibration: use 'minmax' or 'mse'.")
    if not 0 < norm <= 1:
        raise ValueError(f"norm={norm} is not in (0, 1]: use e.g. 0.7.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be positive: use e.g. 20, or rtn().")

    def init(d_in: int, d_out: int) -> tuple[()]:
        return ()

    def update(stats: tuple[()], batch: LayerBatch) -> tuple[()]:
        return stats

    def solve(weight: Float[Array, "d_in d_out"], stats: tuple[()], spec: QuantSpec) -> QuantizedTensor:
        d_in, d_out = weight.shape
        grouped = split_groups(weight.astype(jnp.float32), spec)
        real = (jnp.arange(grouped.shape[0] * grouped.shape[1]) < d_in).reshape(grouped.shape[:2])
        fit = partial(half_quadratic, spec=spec, start=grid, norm=norm, iterations=iterations)
        fitted = jax.lax.map(lambda group: fit(*group), (grouped, real))
        codes = _codes(grouped, grids.Grid(*(leaf[:, None] for leaf in fitted)), spec)
        tensor = assemble(codes.reshape(-1, d_out)[:d_in], fitted, spec)
        return tensor if spec.symmetric else replace(tensor, zeros=fitted.zero.astype(spec.scale_dtype or "float32"))

    settings = (("grid", grid), ("norm", norm), ("iterations", iterations))
    return Method(init, update, solve, name="hqq", settings=settings, independent_outputs=True)


def half_quadratic(
    group: Float[Array, "rows d_out"],
    real: Bool[Array, "rows"],
    *,
    spec: QuantSpec,
    start: str,
    norm: float,
    iterations: int,
) -> grids.Grid:
    """The grid of one group, starting from the one called `start`; rows that are not real count for nothing."""
    counts = real.astype(jnp.float32)[:, None]
    first = grids.fit(start, group, counts[:, 0], spec)

    def improve(k: Array, carry: tuple[grids.Grid, grids.Grid, Array]) -> tuple[grids.Grid, grids.Grid, Array]:
        grid, best, least = carry
        codes = _codes(group, jax.tree.map(lambda leaf: leaf[None], grid), spec)
        steps = codes - grid.zero[None]
        error = group - steps * grid.scale[None]
        loss = jnp.sum(counts * jnp.abs(error) ** norm, axis=0)
        better = loss < least
        best = jax.tree.map(partial(jnp.where, better), grid, best)
        beta = _BETA * _GROWTH ** k.astype(jnp.float32)
        wanted = group - shrink(error, beta, norm)
        if spec.symmetric:
            dots = jnp.sum(counts * steps * wanted, axis=0), jnp.sum(counts * steps * steps, axis=0)
            scale = jnp.where((dots[0] > 0) & (dots[1] > 0), dots[0] / jnp.where(dots[1] > 0, dots[1], 1.0), grid.scale)
            grid = grids.Grid(grids.representable(scale, spec), grid.zero)
        else:
            zero = jnp.sum(counts * (codes - wanted / grid.scale[None]), axis=0) / jnp.sum(counts)
            grid = grids.Grid(grid.scale, _stored(zero, spec))
        return grid, best, jnp.minimum(loss, least)

    worst = jnp.full_like(first.scale, jnp.inf)
    # Once more than it moves, so that the last grid is judged too.
    return jax.lax.fori_loop(0, iterations + 1, improve, (first, first, worst))[1]


def shrink(error: Float[Array, "rows d_out"], beta: Float[Array, ""], norm: float) -> Float[Array, "rows d_out"]:
    """The generalized soft threshold: where |x|^p + beta/2 (x - error)^2 is least, nearly."""
    size = jnp.abs(error)
    # An error of zero has an infinite threshold, and stays zero.
    return jnp.sign(error) * jnp.maximum(size - jnp.where(size > 0, size, 1.0) ** (norm - 1) / beta, 0.0)


def _codes(group: Float[Array, "*rows d_out"], grid: grids.Grid, spec: QuantSpec) -> Float[Array, "*rows d_out"]:
    """The nearest codes, where zero points are fractions."""
    return jnp.clip(jnp.round(group / grid.scale + grid.zero), 0, spec.max_code)


def _stored(zero: Float[Array, "d_out"], spec: QuantSpec) -> Float[Array, "d_out"]:
    """As a QuantizedTensor will hold it, so that codes are chosen for the zero points that will be used."""
    return zero.astype(spec.scale_dtype or "float32").astype(jnp.float32)
