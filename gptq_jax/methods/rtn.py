"""Round to nearest: the baseline that needs no calibration."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_jax import grids
from gptq_jax.methods.base import LayerBatch, Method, assemble
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor


@lru_cache  # the same functions for the same grid, so that jit knows them again
def rtn(grid: str = "minmax") -> Method:
    """Round every weight to the nearest point of its group's grid.

    Assumes nothing of the inputs: an error counts the same in every weight. The search of "mse" is that of the GPTQ
    authors' code (Frantar et al. 2022, arXiv 2210.17323).

    Args:
        grid: "minmax" or "mse" ("ldl" needs a Hessian, which rounding to nearest does not look at).
    """
    if grid not in ("minmax", "mse"):
        raise ValueError(f"grid={grid!r} does not go with rounding to nearest: use 'minmax' or 'mse'.")

    def init(d_in: int, d_out: int) -> tuple[()]:
        return ()

    def update(stats: tuple[()], batch: LayerBatch) -> tuple[()]:
        return stats

    def solve(weight: Float[Array, "d_in d_out"], stats: tuple[()], spec: QuantSpec) -> QuantizedTensor:
        return round_to_nearest(weight, spec, grid=grid)

    return Method(init, update, solve, name="rtn", settings=(("grid", grid),), independent_outputs=True)


@partial(jax.jit, static_argnames=("spec", "grid"))
def round_to_nearest(weight: Float[Array, "d_in d_out"], spec: QuantSpec, grid: str = "minmax") -> QuantizedTensor:
    """`weight` on the grid called `grid` of each of its groups."""
    ones = jnp.ones(weight.shape[0], jnp.float32)
    return round_to_grid(weight, fit_groups(weight, spec, grid, ones), spec)


def fit_groups(
    weight: Float[Array, "d_in d_out"], spec: QuantSpec, grid: str, pivots: Float[Array, "d_in"]
) -> grids.Grid:
    """The grid called `grid` of each group, [groups, d_out]; rows have these pivots, as for `grids.fit`."""
    grouped = split_groups(weight.astype(jnp.float32), spec), split_groups(pivots[:, None], spec)[..., 0]
    return jax.lax.map(lambda group: grids.fit(grid, group[0], group[1], spec), grouped)


def round_to_grid(weight: Float[Array, "d_in d_out"], grid: grids.Grid, spec: QuantSpec) -> QuantizedTensor:
    """`weight` on a grid [groups, d_out]."""
    codes, _ = _nearest(weight, grid, spec)
    return assemble(codes.reshape(-1, weight.shape[1])[: weight.shape[0]], grid, spec)


def rounded_values(weight: Float[Array, "d_in d_out"], grid: grids.Grid, spec: QuantSpec) -> Float[Array, "d_in d_out"]:
    """What `round_to_grid` stands for, without packing it."""
    return grids.dequantize(*_nearest(weight, grid, spec)).reshape(-1, weight.shape[1])[: weight.shape[0]]


def _nearest(
    weight: Float[Array, "d_in d_out"], grid: grids.Grid, spec: QuantSpec
) -> tuple[Float[Array, "groups rows d_out"], grids.Grid]:
    """Codes by group, and their grid [groups, 1, d_out]."""
    of_rows = grids.Grid(*(leaf[:, None] for leaf in grid))
    return grids.quantize(split_groups(weight.astype(jnp.float32), spec), of_rows, spec), of_rows


def split_groups(weight: Float[Array, "d_in d_out"], spec: QuantSpec) -> Float[Array, "groups rows d_out"]:
    """Groups of rows, the last padded with zeros, which no grid with zero on it minds."""
    d_in, d_out = weight.shape
    rows, groups = spec.group_rows(d_in), spec.groups(d_in)
    return jnp.pad(weight, ((0, rows * groups - d_in), (0, 0))).reshape(groups, rows, d_out)
