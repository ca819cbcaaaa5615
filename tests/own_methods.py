"""A quantization method as a user would write it."""

import jax
import jax.numpy as jnp

from gptq_jax import Method, grids
from gptq_jax.methods.rtn import round_to_grid, rtn, split_groups


def clip_search(shrink=(1.0, 0.95, 0.9, 0.85, 0.8)) -> Method:
    """Round to nearest on the clipped grid whose input-weighted error is least."""

    def init(d_in, d_out):
        return jnp.zeros(d_in)  # sum of x**2

    def update(energy, batch):
        return energy + jnp.sum(batch.x**2, axis=0)

    def solve(weight, energy, spec):
        def attempt(factor):
            grid = jax.vmap(lambda group: grids.minmax(group, spec))(split_groups(factor * weight, spec))
            tensor = round_to_grid(weight, grid, spec)
            return jnp.sum(energy[:, None] * (weight - tensor.dequantize()) ** 2), tensor

        losses, tensors = jax.vmap(attempt)(jnp.array(shrink))
        return jax.tree.map(lambda leaf: leaf[jnp.argmin(losses)], tensors)

    return Method(init, update, solve)


def no_method() -> int:
    """A factory that breaks its promise."""
    return 3


def needs_more(shrink) -> Method:
    """A factory that a name alone cannot call."""
    return clip_search(shrink)


def averages() -> Method:
    """A method whose statistics several devices could not add up."""
    return clip_search()._replace(name="averages", update=lambda energy, batch: jnp.mean(batch.x**2, axis=0))


def forgets_to_pack() -> Method:
    """A method that returns a float weight."""
    return clip_search()._replace(name="forgets to pack", solve=lambda weight, energy, spec: weight)


def fails_on_columns() -> Method:
    """Round to nearest, but for one kind of grid."""

    def solve(weight, stats, spec):
        if spec.group_size == -1:
            raise NotImplementedError("whole columns are too long")
        return rtn().solve(weight, stats, spec)

    return rtn()._replace(solve=solve)
