"""A block of one linear layer, and what it is tuned on."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.tuning.fit import Example

D_IN, D_OUT, TOKENS = 20, 6, 9  # groups of 8, 8 and 4


class Linear:
    """A block of one linear layer."""

    def run(self, params, state, mask, known):
        return state @ params["up"]["kernel"]

    def capture(self, params, state, wanted, mask, known):
        return {"up": state}

    def rows(self, state, path):
        return state.shape[0] * state.shape[1]


def problem(spec, group_of_row=None, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((D_IN, D_OUT)).astype(np.float32)
    tensor = round_to_nearest(jnp.asarray(weight), spec)
    if group_of_row is not None:
        tensor = replace(tensor, group_of_row=jnp.asarray(group_of_row, jnp.int32))
    states = rng.standard_normal((2, TOKENS, D_IN)).astype(np.float32)
    mask = jnp.arange(TOKENS)[None] < 6
    examples = [Example(jnp.asarray(state[None]), jnp.asarray(state[None] @ weight), mask) for state in states]
    return {"up": {"kernel": tensor}}, {"up": jnp.asarray(weight)}, examples
