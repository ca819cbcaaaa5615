"""A layer whose inputs have drifted: what it is fed, what the float model fed it, and its weight."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptq_jax.methods import LayerBatch, Method
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor


class Drifting(NamedTuple):
    x: np.ndarray
    x_float: np.ndarray
    weight: np.ndarray

    def stats(self, method: Method):
        stats = method.init(*self.weight.shape)
        for rows in zip(np.split(self.x, 4), np.split(self.x_float, 4), strict=True):
            stats = method.update(stats, LayerBatch(*map(jnp.asarray, rows)))
        return stats

    def solve(self, method: Method, spec: QuantSpec) -> QuantizedTensor:
        solution = method.solve(jnp.asarray(self.weight), self.stats(method), spec)
        return getattr(solution, "tensor", solution)

    def error(self, weight) -> float:
        """|X W - Xq Q|^2: how far the layer's outputs are from those of the float model."""
        wanted = self.x_float.astype(np.float64) @ self.weight
        return float(np.sum((wanted - self.x.astype(np.float64) @ np.asarray(weight, np.float64)) ** 2))


def drifting(d_in=150, d_out=40, tokens=640, seed=0, size=0.25) -> Drifting:
    """Correlated inputs of different strength, and an error in them that is correlated with them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d_in, d_in)) * (np.arange(1, d_in + 1) ** -0.25)[:, None]
    exact = rng.normal(size=(tokens, d_in)) @ mixing
    drifted = exact + size * (exact @ rng.normal(size=(d_in, d_in)) / d_in**0.5 + rng.normal(size=(tokens, d_in)))
    weight = rng.normal(size=(d_in, d_out))
    return Drifting(drifted.astype(np.float32), exact.astype(np.float32), weight.astype(np.float32))
