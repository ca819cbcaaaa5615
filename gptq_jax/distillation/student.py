"""A packed model whose weights move: forward through its blocks, and back, where each block takes its step at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from gptq_jax.hooks.nnx import Params, with_kernel
from gptq_jax.methods.base import Tuning, Variables
from gptq_jax.models.base import Model, embed
from gptq_jax.models.quantizable import Forward
from gptq_jax.storage.parts import packed_layers
from gptq_jax.tuning.fit import Kernels, Tensors, init, kernels_of, moved, packed, start


class Window(NamedTuple):
    """A row of the calibration.

    Attributes:
        tokens: int32.
        mask: True for real tokens; None if all are.
    """

    tokens: Int32[Array, "1 time"]
    mask: Bool[Array, "1 time"] | None


class Moving(NamedTuple):
    """Of one block.

    Attributes:
        variables: what moves, of each packed layer by path.
        optimizer: what optax keeps of it.
    """

    variables: dict[str, Variables]
    optimizer: Any


@dataclass(frozen=True)
class Student:
    """What stays while a model is trained.

    Attributes:
        model: packed.
        tuning: what moves, and how.
        steps: that will be taken in all.
    """

    model: Model
    tuning: Tuning
    steps: int

    def start(self) -> list[Moving]:
        """Before the first step, of each block."""
        found = []
        for tensors in self._parts()[1]:
            variables = start(self.tuning, _dequantized(tensors), tensors)
            found.append(Moving(variables, init(self.tuning, self.steps, variables)))
        return found

    def states(self, moving: Sequence[Moving], window: Window) -> list[Float[Array, "1 time d_model"]]:
        """The stream before each block, and after the last."""
        found = [embed(self.model.config, self.model.params, window.tokens)]
        for block, params, tensors, own in zip(self.model.blocks(), *self._parts(), moving, strict=True):
            arrays = own.variables, params, tensors, window.mask, found[-1]
            found.append(_forward(self.tuning, block.forward, *arrays))
        return found

    def step(
        self,
        moving: Sequence[Moving],
        window: Window,
        states: Sequence[Float[Array, "1 time d_model"]],
        slope: Float[Array, "1 time d_model"],
    ) -> list[Moving]:
        """After one step; what was before is used up.

        Args:
            moving: of each block.
            window: that the step is for.
            states: before each block.
            slope: of the loss in the stream after the last.
        """
        found = []
        parts = zip(self.model.blocks(), *self._parts(), moving, states, strict=True)
        for block, params, tensors, own, x in reversed(list(parts)):
            after, slope = _step(self.tuning, block.forward, self.steps, own, params, tensors, window.mask, x, slope)
            found.append(after)
        return found[::-1]

    def packed(self, moving: Sequence[Moving]) -> Model:
        """The model as it is stored."""
        layers = []
        for params, tensors, own in zip(*self._parts(), moving, strict=True):
            for path, tensor in packed(self.tuning, _dequantized(tensors), tensors, own.variables).items():
                params = with_kernel(params, path, tensor)
            layers.append(params)
        return replace(self.model, params={**self.model.params, "layers": layers})

    def _parts(self) -> tuple[list[Params], list[Tensors]]:
        blocks = self.model.params["layers"]
        return blocks, [packed_layers(block) for block in blocks]


def _run(
    tuning: Tuning,
    forward: Forward,
    params: Params,
    tensors: Tensors,
    mask: Bool[Array, "1 time"] | None,
    variables: dict[str, Variables],
    x: Float[Array, "1 time d_model"],
) -> Float[Array, "1 time d_model"]:
    for path, kernel in kernels_of(tuning, _dequantized(tensors), tensors, variables).items():
        params = with_kernel(params, path, kernel.astype(x.dtype))
    return forward.run(params, x, mask, {})


@partial(jax.jit, static_argnums=(0, 1))
def _forward(
    tuning: Tuning,
    forward: Forward,
    variables: dict[str, Variables],
    params: Params,
    tensors: Tensors,
    mask: Bool[Array, "1 time"] | None,
    x: Float[Array, "1 time d_model"],
) -> Float[Array, "1 time d_model"]:
    return _run(tuning, forward, params, tensors, mask, variables, x)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(
    tuning: Tuning,
    forward: Forward,
    steps: int,
    own: Moving,
    params: Params,
    tensors: Tensors,
    mask: Bool[Array, "1 time"] | None,
    x: Float[Array, "1 time d_model"],
    slope: Float[Array, "1 time d_model"],
) -> tuple[Moving, Float[Array, "1 time d_model"]]:
    """The block after its step, and the slope in the stream before it."""
    _, pull = jax.vjp(partial(_run, tuning, forward, params, tensors, mask), own.variables, x)
    slopes, before = pull(slope)
    return Moving(*moved(tuning, steps, own.variables, own.optimizer, slopes)), before


def _dequantized(tensors: Tensors) -> Kernels:
    return {path: tensor.dequantize(jnp.float32) for path, tensor in tensors.items()}
