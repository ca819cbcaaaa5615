"""Zero points stored as fractions, which gradient descent can move; a grid of few codes has much to gain from that."""

from dataclasses import replace
from functools import lru_cache

from jaxtyping import Array, Float

from gptq_jax.methods.base import Method, Solution, Stats
from gptq_jax.methods.gptq import gptq
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor


@lru_cache  # the same functions for the same options, so that jit knows them again
def fractional_zeros(method: Method | None = None) -> Method:
    """Solve by another method, and store its zero points in the dtype of scales.

    By itself that changes no weight. `block_tuning` and `distill` then move zero points with scales, as OmniQuant (Shao
    et al. 2023, arXiv 2308.13137, equation 2) and EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.2) do
    while they train. Assumes that eight more bits for each group are worth it, and a runtime that takes fractions: the
    formats of other tools have none. Symmetric grids, which have no zero points, stay as they are.

    Args:
        method: makes codes and grid; `gptq()` if None.
    """
    chosen = gptq() if method is None else method

    def solve(weight: Float[Array, "d_in d_out"], stats: Stats, spec: QuantSpec) -> QuantizedTensor | Solution:
        solution = chosen.solve(weight, stats, spec)
        tensor = solution.tensor if isinstance(solution, Solution) else solution
        if tensor.zeros is not None:
            tensor = replace(tensor, zeros=tensor.zeros.astype(tensor.scales.dtype))
        return solution._replace(tensor=tensor) if isinstance(solution, Solution) else tensor

    return chosen._replace(solve=solve, settings=(*chosen.settings, ("fractional_zeros", True)))
