"""Scales and zero points of a whole block, moved by gradient descent while the codes stay.

What OmniQuant (Shao et al. 2023, arXiv 2308.13137, equation 1) does block by block, with the parameters that
EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.2, Block-AP) trains, less the weights themselves:
    minimize over scales and zeros  |F(x_quantized; (code - zero) * scale) - F(x_float; W)|^2
"""

from functools import lru_cache

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gptq_jax import grids
from gptq_jax.methods.base import Tuning
from gptq_jax.tensor import QuantizedTensor
from gptq_jax.tuning.fit import straight_through
from pallas_kernels.packing import unpack

Moved = dict[str, Float[Array, "groups d_out"]]


@lru_cache  # the same functions for the same options, so that jit knows them again
def block_tuning(*, epochs: int = 2, rate: float = 1e-2) -> Tuning:
    """Move scales, and zero points that are stored as fractions, by Adam with a cosine decay.

    Codes stay, and zero points that are whole numbers: a step of one moves all weights of its group by a whole code.
    The size and the form of what is stored stay too. Assumes that the block's outputs on the calibration tell how good
    its scales are; few windows are fitted more closely than other text.

    Args:
        epochs: passes over the calibration; each window is one step.
        rate: of learning the logarithm of scales, and zero points in units of codes, at the first step.
    """
    check_epochs(epochs)
    if not rate > 0:
        raise ValueError(f"rate={rate} must be positive: use e.g. 0.01.")

    def start(weight: Float[Array, "d_in d_out"], tensor: QuantizedTensor) -> Moved:
        nothing = jnp.zeros(tensor.scales.shape, jnp.float32)
        return {"log_scale": nothing, "zero": nothing} if _has_fractions(tensor) else {"log_scale": nothing}

    def values(
        moved: Moved, weight: Float[Array, "d_in d_out"], tensor: QuantizedTensor
    ) -> tuple[Float[Array, "d_in d_out"], grids.Grid]:
        grid = grids.grid_of(tensor)
        codes = unpack(tensor.codes, tensor.spec.bits, tensor.d_in).astype(jnp.float32)
        scale = grid.scale * jnp.exp(moved["log_scale"])  # stays positive
        zero = grid.zero
        if tensor.zeros is not None and "zero" in moved:
            exact = zero + moved["zero"]
            zero = straight_through(exact.astype(tensor.zeros.dtype).astype(jnp.float32), exact)
        return codes, grids.Grid(straight_through(grids.representable(scale, tensor.spec), scale), zero)

    def optimizer(steps: int) -> optax.GradientTransformation:
        # The slopes of a relative error are small, and must not be lost in Adam's epsilon.
        return optax.adam(optax.cosine_decay_schedule(rate, steps), eps=1e-16)

    return Tuning(start, values, optimizer, epochs, "block tuning", settings=(("epochs", epochs), ("rate", rate)))


def check_epochs(epochs: int) -> None:
    """Raise ValueError unless there is one."""
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1; without tuning there is nothing to learn.")


def _has_fractions(tensor: QuantizedTensor) -> bool:
    return tensor.zeros is not None and jnp.issubdtype(tensor.zeros.dtype, jnp.floating)
