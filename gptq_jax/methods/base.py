"""What a quantization method is: pure functions over a state pytree."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from gptq_jax import grids
from gptq_jax.hessian import accumulate
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import pack

Stats = Any  # a pytree of arrays
Variables = Any  # a pytree of arrays


class LayerBatch(NamedTuple):
    """Inputs of a linear layer for one calibration batch, [tokens, d_in]; rows of padding are zero.

    Attributes:
        x: as the model gives them whose earlier layers are quantized already.
        x_float: as the float model gives them, if the method needs those (`needs_float_inputs`). Experts are given `x`
            again, for the float model may route otherwise.
    """

    x: Float[Array, "tokens d_in"]
    x_float: Float[Array, "tokens d_in"] | None = None


class Solution(NamedTuple):
    """A quantized weight and what its solver has to say of it, scalars by name, for the report.

    The pipeline knows `damping` and `fell_back` (true: the weight was rounded to nearest after all).
    """

    tensor: QuantizedTensor
    notes: dict[str, Array]


class Rewrite(NamedTuple):
    """A change of a model's weights, made before they are solved, that leaves its outputs as they are.

    Attributes:
        apply: (model, batches, rules) -> model: the float model in memory, the calibration as `Batch`es, and the
            `SpecRules` by which its layers will be quantized.
        name: for reports.
        settings: what it was made with, by name, for the report.
    """

    apply: Callable[[Any, Sequence[Any], SpecRules], Any]
    name: str
    settings: tuple[tuple[str, Any], ...] = ()


class Tuning(NamedTuple):
    """Gradient descent on what a block's packed weights are made of, once its layers are solved.

    The block's outputs are brought nearer to those of the float block. Functions are of one weight; those of stacked
    experts are mapped over.

    Attributes:
        start: (weight [d_in, d_out] float32, QuantizedTensor) -> Variables: what moves, at values that change nothing.
        values: (Variables, weight, QuantizedTensor) -> codes [d_in, d_out] and `Grid`, float32 but exactly what will be
            stored; `straight_through` lets gradients pass where they are rounded.
        optimizer: (steps) -> optax.GradientTransformation of all layers' Variables, a dict by path.
        epochs: passes over the calibration, each window one step.
        name: for reports.
        settings: what it was made with, by name, for the report.
    """

    start: Callable[[Array, QuantizedTensor], Variables]
    values: Callable[[Variables, Array, QuantizedTensor], tuple[Array, grids.Grid]]
    optimizer: Callable[[int], optax.GradientTransformation]
    epochs: int
    name: str
    settings: tuple[tuple[str, Any], ...] = ()


class Finish(NamedTuple):
    """What is done to a quantized model as a whole, after its last block.

    Attributes:
        apply: (model, quantized, report, batches) -> quantized, report: the float model, rewritten if the method does
            that, what was made of it, both in memory, and the calibration as `Batch`es.
        name: for reports.
        settings: what it was made with, by name, for the report.
    """

    apply: Callable[[Any, Any, Any, Sequence[Any]], tuple[Any, Any]]
    name: str
    settings: tuple[tuple[str, Any], ...] = ()


class Method(NamedTuple):
    """A quantization method. Adding one needs no registration: pass the value as `method=`.

    Attributes:
        name: for reports.
        init: (d_in, d_out) -> Stats, before the first batch: zeros.
        update: (Stats, LayerBatch) -> Stats; jitted by the caller. Statistics are sums over tokens, so that devices can
            add up theirs.
        solve: (weight [d_in, d_out], Stats, QuantSpec) -> QuantizedTensor or Solution; jitted by the caller,
            the spec being static. Layers with the same input are solved as one, their outputs concatenated.
        hessian: reads sum x x^T from Stats where the method keeps it, so that the report need not add it up again.
        settings: what it was made with, by name, for the report.
        needs_float_inputs: batches carry `x_float`, which takes a second pass through the model.
        independent_outputs: `solve` treats each output by itself, so that devices can share them.
        rewrite: of the model, before: `gptq()._replace(rewrite=hadamard())`.
        tuning: of each block, after: `gptq()._replace(tuning=block_tuning())`.
        finish: of the whole model, in the end: `gptq()._replace(finish=end_to_end_tuning())`.
    """

    init: Callable[[int, int], Stats]
    update: Callable[[Stats, LayerBatch], Stats]
    solve: Callable[[Array, Stats, QuantSpec], QuantizedTensor | Solution]
    hessian: Callable[[Stats], Array] | None = None
    name: str = "custom"
    settings: tuple[tuple[str, Any], ...] = ()  # pairs, so that a method stays hashable
    needs_float_inputs: bool = False
    independent_outputs: bool = False
    rewrite: Rewrite | None = None
    tuning: Tuning | None = None
    finish: Finish | None = None

    @property
    def all_settings(self) -> dict[str, Any]:
        """Its own and those of its tuning and its finish, for reports."""
        settings = dict(self.settings)
        if self.tuning is not None:
            tuning = {f"tuning_{name}": value for name, value in self.tuning.settings}
            settings |= {"tuning": self.tuning.name, **tuning}
        if self.finish is not None:
            settings |= {"finish": self.finish.name, **dict(self.finish.settings)}
        return settings


@lru_cache
def with_hessian(method: Method) -> Method:
    """The method, with statistics that hold the Hessian too if they do not already."""
    if method.hessian is not None:
        return method

    def init(d_in: int, d_out: int) -> tuple[Stats, Array]:
        return method.init(d_in, d_out), jnp.zeros((d_in, d_in), jnp.float32)

    def update(stats: tuple[Stats, Array], batch: LayerBatch) -> tuple[Stats, Array]:
        return method.update(stats[0], batch), accumulate(stats[1], batch.x)

    def solve(weight: Array, stats: tuple[Stats, Array], spec: QuantSpec) -> QuantizedTensor | Solution:
        return method.solve(weight, stats[0], spec)

    return method._replace(init=init, update=update, solve=solve, hessian=lambda stats: stats[1])


def assemble(
    codes: Integer[Array, "d_in d_out"] | Float[Array, "d_in d_out"],
    grid: grids.Grid,
    spec: QuantSpec,
    group_of_row: Integer[Array, "d_in"] | None = None,
) -> QuantizedTensor:
    """Pack integer-valued codes and their grid, [groups, d_out], into a QuantizedTensor."""
    return QuantizedTensor(
        codes=pack(codes.astype(jnp.uint8), spec.bits),
        scales=grid.scale.astype(spec.scale_dtype or "float32"),
        zeros=grids.stored_zeros(grid.zero, spec),
        group_of_row=None if group_of_row is None else group_of_row.astype(jnp.int32),
        spec=spec,
        d_in=codes.shape[0],
    )
