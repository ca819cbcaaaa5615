"""Weight -> scales and zero points.

A grid function takes one group of a weight, [rows, d_out], and gives each output its own scale and zero point.
The value of code c is `(c - zero) * scale`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

GRIDS = ("minmax", "mse", "ldl")

# Shrink factors of the clipping search: 1, 1 - 1/80, ..., 1/4, as in the GPTQ authors' code.
_STEPS = 80
_CANDIDATES = 61


class Grid(NamedTuple):
    """Scales and zero points, integral but float32 while solving; [..., d_out]."""

    scale: Float[Array, "*groups d_out"]
    zero: Float[Array, "*groups d_out"]


def minmax(group: Float[Array, "rows d_out"], spec: QuantSpec) -> Grid:
    """The grid that just covers the group.

    Symmetric: scale = 2 max|w| / (2^b - 1), zero = 2^(b-1). Asymmetric: min <= 0 <= max,
    scale = (max - min) / (2^b - 1), zero = round(-min / scale). A group of zeros gets scale 1.
    """
    if spec.symmetric:
        span = 2 * jnp.max(jnp.abs(group), axis=0)
        zero = jnp.full_like(span, 2.0 ** (spec.bits - 1))
        return Grid(representable(jnp.where(span == 0, 1.0, span / spec.max_code), spec), zero)
    low = jnp.minimum(jnp.min(group, axis=0), 0.0)
    high = jnp.maximum(jnp.max(group, axis=0), 0.0)
    scale = jnp.where(high == low, 1.0, (high - low) / spec.max_code)
    # The zero point belongs to the exact scale: rounding of the stored one must not move it past the last code.
    zero = jnp.clip(jnp.round(-low / scale), 0, spec.max_code)
    return Grid(representable(scale, spec), zero)


def clipped(
    group: Float[Array, "rows d_out"],
    importance: Float[Array, "rows"],
    spec: QuantSpec,
    norm: float,
) -> Grid:
    """The shrunk `minmax` grid whose rounding error sum(importance * |error|**norm) is least.

    Args:
        group: weights.
        importance: of each row's error. Ones: the paper's mse search (norm 2.4). The pivots of the LDL
            factorization of the Hessian (norm 2): exactly the error that the solver's compensation leaves.
        spec: the grid.
        norm: the power of the error.
    """
    full = minmax(group, spec)
    least_step, most_step = -full.zero, spec.max_code - full.zero

    def attempt(step: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least, scale = best
        shrunk = representable(full.scale * (1.0 - step.astype(jnp.float32) / _STEPS), spec)
        # In units of the scale: fewest operations on each weight, and no underflow of small weights.
        steps = group * (1.0 / shrunk)[None]
        error = steps - jnp.clip(jnp.round(steps), least_step[None], most_step[None])
        error = error * error if norm == 2 else jnp.exp(norm * jnp.log(jnp.abs(error)))
        # A product, because on a CPU the sum would take the errors it sums one by one, not as vectors.
        loss = jnp.matmul(importance[None], error, precision="highest")[0] * (shrunk / full.scale) ** norm
        return jnp.minimum(loss, least), jnp.where(loss < least, shrunk, scale)

    worst = jnp.full_like(full.scale, jnp.inf)
    _, scale = jax.lax.fori_loop(0, _CANDIDATES, attempt, (worst, full.scale))
    return Grid(scale, full.zero)


def fit(name: str, group: Float[Array, "rows d_out"], pivots: Float[Array, "rows"], spec: QuantSpec) -> Grid:
    """The grid called `name` (one of GRIDS) of one group, whose rows have these LDL pivots."""
    if name == "minmax":
        return minmax(group, spec)
    if name == "mse":
        return clipped(group, jnp.ones_like(pivots), spec, norm=2.4)
    if name == "ldl":
        return clipped(group, pivots, spec, norm=2.0)
    raise ValueError(f"grid={name!r} is not supported: use one of {list(GRIDS)}.")


def quantize(weight: Float[Array, "*rows d_out"], grid: Grid, spec: QuantSpec) -> Float[Array, "*rows d_out"]:
    """The nearest codes, as float32."""
    return jnp.clip(jnp.round(weight / grid.scale) + grid.zero, 0, spec.max_code)


def dequantize(codes: Float[Array, "*rows d_out"], grid: Grid) -> Float[Array, "*rows d_out"]:
    """The values of codes."""
    return (codes - grid.zero) * grid.scale


def stored_zeros(zero: Float[Array, "groups d_out"], spec: QuantSpec) -> UInt8[Array, "groups d_out"] | None:
    """Zero points as a QuantizedTensor holds them."""
    return None if spec.symmetric else zero.astype(jnp.uint8)


def grid_of(tensor: QuantizedTensor) -> Grid:
    """The grid of a weight as float32; the zero of a symmetric one is its middle code."""
    scale = tensor.scales.astype(jnp.float32)
    middle = 2.0 ** (tensor.spec.bits - 1)
    return Grid(scale, jnp.full_like(scale, middle) if tensor.zeros is None else tensor.zeros.astype(jnp.float32))


def representable(scale: Float[Array, "*groups d_out"], spec: QuantSpec) -> Float[Array, "*groups d_out"]:
    """Round to the stored dtype, so that codes are chosen for the scales that will be used; never to zero."""
    dtype = jnp.dtype(spec.scale_dtype or "float32")
    least, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    return jnp.clip(scale, least, most).astype(dtype).astype(jnp.float32)
