"""GPTAQ, asymmetric calibration (Li et al. 2025, arXiv 2504.02692, equation 9), computed as GPTQ of a shifted weight.

When GPTQ has rounded input i, the paper's update also lets the inputs to come make up for what the layers before
have done to input i: row i of P = strictly_upper((X - Xq)^T Xq U^T) U, times the weight of input i, is added to
them, with H^-1 = U^T U. All these additions are known beforehand if that weight is the original one, whose outputs
are what is wanted; they shift the weight to W + P^T W. With H = R R^T and the drift E = Xq^T (X - Xq), all in the
order of solving, that is W + R^-T strictly_lower(R^-1 E) W: QEP's correction without what an input would do for
itself and for those before it.
"""

from dataclasses import asdict
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Integer

from gptq_jax.hessian import accumulate, accumulate_drift, factorize
from gptq_jax.methods.base import LayerBatch, Method, Solution
from gptq_jax.methods.gptq import GPTQOptions, input_order, solve_layer
from gptq_jax.spec import QuantSpec


class GPTAQStats(NamedTuple):
    """The Hessian Xq^T Xq and the drift Xq^T (X - Xq)."""

    hessian: Float[Array, "d_in d_in"]
    drift: Float[Array, "d_in d_in"]


@lru_cache  # the same functions for the same options, so that jit knows them again
def gptaq(
    *,
    alpha: float = 0.25,
    order: str = "activation",
    static_groups: bool = True,
    grid: str = "ldl",
    damping: float = 0.01,
) -> Method:
    """GPTQ that also makes up for the errors of earlier layers, as it goes.

    Assumes what `gptq` assumes, and that the inputs to come can make up for what the layers before have done to one;
    the less calibration there is, the less that holds on other text, hence alpha.

    Args:
        alpha: of P, in [0, 1].
        order, static_groups, grid, damping: see `GPTQOptions`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in [0, 1]: use e.g. 0.25.")
    options = GPTQOptions(order=order, static_groups=static_groups, grid=grid, damping=damping)

    def init(d_in: int, d_out: int) -> GPTAQStats:
        return GPTAQStats(*(jnp.zeros((d_in, d_in), jnp.float32) for _ in range(2)))

    def update(stats: GPTAQStats, batch: LayerBatch) -> GPTAQStats:
        assert batch.x_float is not None
        drift = accumulate_drift(stats.drift, batch.x, batch.x_float)
        return GPTAQStats(accumulate(stats.hessian, batch.x), drift)

    def solve(weight: Float[Array, "d_in d_out"], stats: GPTAQStats, spec: QuantSpec) -> Solution:
        turn = _order_of_inputs(jnp.diagonal(stats.hessian), order, spec)
        return solve_layer(shift(weight, stats, turn, alpha, damping), stats.hessian, spec, options)

    return Method(
        init,
        update,
        solve,
        hessian=lambda stats: stats.hessian,
        name="gptaq",
        settings=(*asdict(options).items(), ("alpha", alpha)),
        needs_float_inputs=True,
        independent_outputs=True,
    )


def shift(
    weight: Float[Array, "d_in d_out"],
    stats: GPTAQStats,
    order: Integer[Array, "d_in"],
    alpha: float,
    damping: float,
) -> Float[Array, "d_in d_out"]:
    """`weight + alpha P^T weight` for inputs that are rounded in this order."""
    hessian, drift = (matrix[order[:, None], order[None]] for matrix in stats)
    factor = factorize(hessian, damping, jnp.mean(jnp.diagonal(hessian)))
    rows = weight.astype(jnp.float32)[order]
    later = jnp.tril(solve_triangular(factor.upper, drift), -1)
    step = solve_triangular(factor.upper, jnp.matmul(later, rows, precision="highest"), trans="T")
    return (rows + jnp.where(factor.succeeded, alpha, 0.0) * step)[jnp.argsort(order)]


def _order_of_inputs(diagonal: Float[Array, "d_in"], order: str, spec: QuantSpec) -> Integer[Array, "d_in"]:
    """The order in which `solve_layer`, which pads to whole groups, rounds the inputs that exist."""
    d_in = diagonal.shape[0]
    group_rows = spec.group_rows(d_in)
    padded = input_order(jnp.pad(diagonal, (0, group_rows * spec.groups(d_in) - d_in)), order, group_rows)
    return jnp.argsort(jnp.argsort(padded)[:d_in])
