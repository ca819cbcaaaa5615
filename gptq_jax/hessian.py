"""The Hessian of a layer's output error: accumulate it, damp it, factor it, measure with it.

The loss of replacing W by Q is tr((W-Q)^T H (W-Q)) with H = X^T X; any positive factor of H changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MAX_DAMPING = 1.0


class Factor(NamedTuple):
    """R, upper triangular, with R R^T = H + damping * mean(diag H) * I."""

    upper: Float[Array, "d_in d_in"]
    damping: Float[Array, ""]
    succeeded: Bool[Array, ""]  # False: `upper` is the identity, with which GPTQ is round to nearest


def accumulate(hessian: Float[Array, "d_in d_in"], inputs: Float[Array, "tokens d_in"]) -> Float[Array, "d_in d_in"]:
    """`hessian + inputs^T inputs`, in float32."""
    x = inputs.astype(jnp.float32)
    return hessian + jnp.matmul(x.T, x, precision="highest")


def accumulate_drift(
    drift: Float[Array, "d_in d_in"], inputs: Float[Array, "tokens d_in"], float_inputs: Float[Array, "tokens d_in"]
) -> Float[Array, "d_in d_in"]:
    """`drift + inputs^T (float_inputs - inputs)`, in float32.

    How the errors of earlier layers show in a layer's inputs. The papers keep C = inputs^T float_inputs and take H off
    it later; subtracting first leaves no small difference of large sums.
    """
    x = inputs.astype(jnp.float32)
    return drift + jnp.matmul(x.T, float_inputs.astype(jnp.float32) - x, precision="highest")


def factorize(hessian: Float[Array, "d_in d_in"], damping: float, mean_diagonal: Float[Array, ""]) -> Factor:
    """The upper triangular factor of the damped Hessian.

    No inverse is needed: GPTQ's U of H^-1 = U^T U is R^-1 (Babai's nearest plane, arXiv 2507.18553).

    Args:
        hessian: in the order in which inputs will be quantized. A zero diagonal entry (an input that never
            fired) becomes 1.
        damping: added to the diagonal as a fraction of its mean; ten times more at each failure, up to 1.
        mean_diagonal: of the inputs that exist (the Hessian may be padded).
    """
    diagonal = jnp.diagonal(hessian)

    def attempt(damping: Array) -> Factor:
        added = jnp.where(diagonal == 0, 1.0, damping * mean_diagonal)
        on_diagonal = jnp.eye(diagonal.shape[0], dtype=bool)
        damped = jnp.where(on_diagonal, (diagonal + added)[None], hessian)
        lower = jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        # A factorization that fails leaves NaN on the diagonal too, where looking is cheap.
        return Factor(lower, damping, jnp.all(jnp.isfinite(jnp.diagonal(lower))))

    def raised(last: Factor) -> Factor:
        # Damping 0 can be asked for; it must be able to grow too.
        return attempt(jnp.clip(last.damping * 10, 1e-6, _MAX_DAMPING))

    def failing(last: Factor) -> Array:
        return ~last.succeeded & (last.damping < _MAX_DAMPING)

    # Under a condition, because a loop that is always entered copies the matrix it carries.
    first = attempt(jnp.float32(damping))
    lower, used, succeeded = jax.lax.cond(
        first.succeeded, lambda: first, lambda: jax.lax.while_loop(failing, raised, first)
    )
    identity = jnp.eye(hessian.shape[0], dtype=jnp.float32)
    return Factor(jnp.where(succeeded, lower[::-1, ::-1], identity), used, succeeded)


def output_energy(error: Float[Array, "d_in d_out"], hessian: Float[Array, "d_in d_in"]) -> Float[Array, "d_out"]:
    """The squared outputs of each column of `error`, summed over the calibration tokens: diag(E^T H E)."""
    return jnp.sum(error * jnp.matmul(hessian, error, precision="highest"), axis=0)
