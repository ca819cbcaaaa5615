"""Learned rounding by signed gradient descent (SignRound, Cheng et al. 2023, arXiv 2309.05516; its tool is AutoRound).

W~ = scale * (clip(round(W / scale + zero + V), 0, 2^b - 1) - zero)                  (equation 3)
scale = (max W * beta - min W * alpha) / (2^b - 1)                                     (equation 4)
V <- V - rate * sign(dL/dV), and so beta and alpha; rate falls from 1/steps to 0       (algorithm 1)
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gptq_jax import grids
from gptq_jax.methods.base import Tuning
from gptq_jax.tensor import QuantizedTensor
from gptq_jax.tuning.block_tuning import check_epochs
from gptq_jax.tuning.fit import of_rows, straight_through
from pallas_kernels.packing import unpack

Moved = dict[str, Float[Array, "_ d_out"]]

_INSIDE = 0.499  # of half a code: what lies there rounds to its code


@lru_cache  # the same functions for the same options, so that jit knows them again
def learned_rounding(*, epochs: int = 4, clip: bool = True) -> Tuning:
    """Learn for each weight whether it is rounded up or down, beginning at the codes that a method chose.

    After rounding to nearest that is SignRound. Where a compensated code is not the nearest, the weight counts as the
    point next to it that rounds to this code; so any method can begin, and no code moves by more than one by V alone.
    Assumes that the signs of slopes through rounding show where codes should go, and that the block's outputs on the
    calibration tell how good they are.

    Args:
        epochs: passes over the calibration; each window is one step. The paper takes 200 steps of 8 windows.
        clip: also shrink the range of each group, which the paper does.
    """
    check_epochs(epochs)

    def start(weight: Float[Array, "d_in d_out"], tensor: QuantizedTensor) -> Moved:
        moved = {"rounding": jnp.zeros_like(weight)}
        if clip:
            ends = ("high",) if tensor.zeros is None else ("high", "low")
            moved |= {end: jnp.zeros(tensor.scales.shape, jnp.float32) for end in ends}
        return moved

    def values(
        moved: Moved, weight: Float[Array, "d_in d_out"], tensor: QuantizedTensor
    ) -> tuple[Float[Array, "d_in d_out"], grids.Grid]:
        most = tensor.spec.max_code
        before, after = grids.grid_of(tensor), clipped(moved, tensor)
        scale, zero = (of_rows(leaf, tensor) for leaf in before)
        codes = unpack(tensor.codes, tensor.spec.bits, tensor.d_in).astype(jnp.float32)
        place = codes + jnp.clip(weight / scale + zero - codes, -_INSIDE, _INSIDE)
        exact = (place - zero) * (scale / of_rows(after.scale, tensor)) + of_rows(after.zero, tensor)
        exact = exact + moved["rounding"]
        # Slopes end where the clipped codes do, half a code beyond the last.
        passing = jnp.clip(exact, -0.5, most + 0.5)
        return straight_through(jnp.clip(jnp.round(exact), 0, most), passing), after

    def optimizer(steps: int) -> optax.GradientTransformation:
        falling = optax.linear_schedule(1 / steps, 0.0, steps)
        return optax.chain(optax.sign_sgd(falling), _within_bounds())

    return Tuning(start, values, optimizer, epochs, "learned rounding", settings=(("epochs", epochs), ("clip", clip)))


def clipped(moved: Moved, tensor: QuantizedTensor) -> grids.Grid:
    """The grid whose ends are drawn in by the parts `high` and `low`; as it is without them."""
    grid, most = grids.grid_of(tensor), tensor.spec.max_code
    if "high" not in moved:
        return grid
    if tensor.zeros is None:
        scale, zero = grid.scale * (1 - moved["high"]), grid.zero
    else:
        high = (most - grid.zero) * grid.scale * (1 - moved["high"])
        low = -grid.zero * grid.scale * (1 - moved["low"])
        scale = (high - low) / most
        exact = -low / scale
        zero = straight_through(_stored_zero(exact, tensor), exact)
    return grids.Grid(straight_through(grids.representable(scale, tensor.spec), scale), zero)


def _stored_zero(exact: Float[Array, "groups d_out"], tensor: QuantizedTensor) -> Float[Array, "groups d_out"]:
    assert tensor.zeros is not None  # asymmetric
    if jnp.issubdtype(tensor.zeros.dtype, jnp.floating):
        return exact.astype(tensor.zeros.dtype).astype(jnp.float32)
    return jnp.clip(jnp.round(exact), 0, tensor.spec.max_code)


def _within_bounds() -> optax.GradientTransformation:
    """Keep V in [-1/2, 1/2], and the parts by which ranges shrink in [0, 1/2]."""

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple:
        def bounded(path: tuple, update: Array, value: Array) -> Array:
            least = -0.5 if path[-1].key == "rounding" else 0.0
            return jnp.clip(value + update, least, 0.5) - value

        return jax.tree_util.tree_map_with_path(bounded, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
