"""The Hessian of a layer's output error: accumulate it, damp it, factor it, measure with it.

The loss of replacing W by Q is tr((W-Q)^T H (W-Q)) with H = X^T X; any positive factor of H changes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

_MAX_DAMPING = 1.0
_PIECES = 8  # of the rows, for which a product is half as much work and an eighth of the memory

Result = TypeVar("Result")


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
    """The upper triangular factor of the damped Hessian; arguments as for `with_factor`."""
    upper, used, succeeded = with_factor(hessian, damping, mean_diagonal, lambda upper: upper)
    return Factor(upper, used, succeeded)


def with_factor(
    hessian: Float[Array, "d_in d_in"],
    damping: float,
    mean_diagonal: Float[Array, ""],
    use: Callable[[Float[Array, "d_in d_in"]], Result],
    order: Integer[Array, "d_in"] | None = None,
) -> tuple[Result, Float[Array, ""], Bool[Array, ""]]:
    """What `use` makes of the upper triangular factor of the damped Hessian.

    No inverse is needed: GPTQ's U of H^-1 = U^T U is R^-1 (Babai's nearest plane, arXiv 2507.18553).

    Args:
        hessian: a zero diagonal entry (an input that never fired) becomes 1.
        damping: added to the diagonal as a fraction of its mean; ten times more at each failure, up to 1.
        mean_diagonal: of the inputs that exist (the Hessian may be padded).
        order: in which inputs will be quantized; None: as they are.
        use: given the factor; the identity in its place if every damping failed.

    Returns:
        Its result, the damping used, and whether that could be factored.
    """
    on_diagonal = jnp.arange(hessian.shape[0])

    def attempt(state: tuple[Result, Array, Array]) -> tuple[Result, Array, Array]:
        _, last, _ = state
        # Damping 0 can be asked for; it must be able to grow too.
        used = jnp.where(last < 0, jnp.float32(damping), jnp.clip(last * 10, 1e-6, _MAX_DAMPING))
        ordered = hessian
        if order is not None:
            # Tied to this turn: moved out of the loop, the copy would take memory to its end.
            place, used = jax.lax.optimization_barrier((order, used))
            ordered = hessian[place[:, None], place[None]]
        diagonal = jnp.diagonal(ordered)
        damped = diagonal + jnp.where(diagonal == 0, 1.0, used * mean_diagonal)
        # Transposed, which changes nothing but spares LAPACK, which goes by columns, a copy.
        reverse = ordered[::-1, ::-1].T.at[on_diagonal, on_diagonal].set(damped[::-1], unique_indices=True)
        lower = jnp.linalg.cholesky(reverse, symmetrize_input=False)
        # A factorization that fails leaves NaN on the diagonal too, where looking is cheap.
        succeeded = jnp.all(jnp.isfinite(jnp.diagonal(lower)))
        upper = jnp.where(succeeded, lower[::-1, ::-1], 0)
        pivots = jnp.where(succeeded, jnp.diagonal(upper), 1)
        return use(upper.at[on_diagonal, on_diagonal].set(pivots, unique_indices=True)), used, succeeded

    def failing(state: tuple[Result, Array, Array]) -> Array:
        _, last, succeeded = state
        return ~succeeded & (last < _MAX_DAMPING)

    # The loop carries what `use` makes of the factor, which is smaller, and not the matrix.
    shapes = jax.eval_shape(use, jax.ShapeDtypeStruct(hessian.shape, jnp.float32))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.while_loop(failing, attempt, (nothing, jnp.float32(-1), jnp.array(False)))


def output_energy(error: Float[Array, "d_in d_out"], hessian: Float[Array, "d_in d_in"]) -> Float[Array, "d_out"]:
    """The squared outputs of each column of `error`, summed over the calibration tokens: diag(E^T H E).

    H is symmetric, so that what is above the blocks on its diagonal counts twice, and what is below is not read.
    """
    d_in = error.shape[0]
    size = -(-d_in // _PIECES)
    energy = jnp.zeros(error.shape[1], jnp.float32)
    for start in range(0, d_in, size):
        here, before = slice(start, start + size), slice(0, start)
        product = jnp.matmul(hessian[here, here], error[here], precision="highest")
        if start:
            product = product + 2 * jnp.matmul(hessian[before, here].T, error[before], precision="highest")
        energy = energy + jnp.sum(error[here] * product, axis=0)
    return energy
