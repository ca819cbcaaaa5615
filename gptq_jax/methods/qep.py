"""QEP, quantization error propagation (Arai and Ichikawa 2025, arXiv 2504.09629, proposition 5.1 and equation 6).

Layers quantized before have changed the inputs from X to Xq. The weight whose outputs on Xq are nearest to X W is
W* = W + (Xq^T Xq)^-1 Xq^T (X - Xq) W; QEP goes the part alpha of that way, and quantizes what it comes to.
"""

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from gptq_jax.hessian import accumulate_drift, factorize
from gptq_jax.methods.base import LayerBatch, Method, Solution, Stats, with_hessian
from gptq_jax.methods.gptq import gptq
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

ALPHA = 0.5  # far better than 1 where calibration is not much


class QEPStats(NamedTuple):
    """The statistics of the method that solves, with the Hessian Xq^T Xq, and the drift Xq^T (X - Xq)."""

    solver: Stats
    drift: Float[Array, "d_in d_in"]


@lru_cache  # the same functions for the same options, so that jit knows them again
def qep(method: Method | None = None, *, alpha: float = ALPHA, damping: float = 0.01) -> Method:
    """Correct each weight for the errors of the layers before it, then solve it by another method.

    Assumes what the method inside does, and that a linear change of the weight can make up for the change of its
    inputs; the less calibration there is, the less that holds on other text, hence alpha.

    Args:
        method: solves the corrected weight: `gptq()` if None. Any that needs no float inputs itself.
        alpha: how much of the correction is made, in [0, 1]: the paper's propagation strength.
        damping: fraction of the Hessian's mean diagonal added to it, as in `GPTQOptions`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in [0, 1]: use e.g. 0.5.")
    chosen = gptq() if method is None else method
    if chosen.needs_float_inputs:
        raise ValueError(f"method {chosen.name!r} makes up for earlier layers itself: use it alone, or another here.")
    solver = with_hessian(chosen)
    assert solver.hessian is not None  # with_hessian saw to it
    hessian_of = solver.hessian

    def init(d_in: int, d_out: int) -> QEPStats:
        return QEPStats(solver.init(d_in, d_out), jnp.zeros((d_in, d_in), jnp.float32))

    def update(stats: QEPStats, batch: LayerBatch) -> QEPStats:
        assert batch.x_float is not None
        drift = accumulate_drift(stats.drift, batch.x, batch.x_float)
        return QEPStats(solver.update(stats.solver, batch), drift)

    def solve(weight: Float[Array, "d_in d_out"], stats: QEPStats, spec: QuantSpec) -> QuantizedTensor | Solution:
        return solver.solve(correct(weight, hessian_of(stats.solver), stats.drift, alpha, damping), stats.solver, spec)

    return chosen._replace(
        init=init,
        update=update,
        solve=solve,
        hessian=lambda stats: hessian_of(stats.solver),
        name="qep",
        settings=(("solver", chosen.name), *chosen.settings, ("alpha", alpha)),
        needs_float_inputs=True,
    )


def correct(
    weight: Float[Array, "d_in d_out"],
    hessian: Float[Array, "d_in d_in"],
    drift: Float[Array, "d_in d_in"],
    alpha: float,
    damping: float,
) -> Float[Array, "d_in d_out"]:
    """`weight + alpha (hessian + damping)^-1 drift weight`; `weight` where no damping helps."""
    factor = factorize(hessian, damping, jnp.mean(jnp.diagonal(hessian)))
    weight = weight.astype(jnp.float32)
    wanted = solve_triangular(factor.upper, jnp.matmul(drift, weight, precision="highest"))
    step = solve_triangular(factor.upper, wanted, trans="T")
    return weight + jnp.where(factor.succeeded, alpha, 0.0) * step
