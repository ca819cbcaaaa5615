"""Gradient descent on what a block's packed weights are made of, towards the outputs of the float block."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Shaped

from gptq_jax.hooks.nnx import Params, kernel_of, with_kernel
from gptq_jax.methods.base import Tuning, Variables
from gptq_jax.models.quantizable import Forward
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import pack

Kernels = dict[str, Float[Array, "*experts d_in d_out"]]  # by path
Tensors = dict[str, QuantizedTensor]  # by path


class Example(NamedTuple):
    """Part of the calibration at a block.

    Attributes:
        state: before the block, in the model as it is quantized so far.
        target: after it, in the float model.
        mask: True for real tokens, of which there is at least one; None if all are.
    """

    state: Any
    target: Any
    mask: Bool[Array, "rows time"] | None


class Tuned(NamedTuple):
    """A block's packed weights, and its error on the calibration, of `block_error`, before and after."""

    tensors: Tensors
    before: float
    after: float


def tune(tuning: Tuning, forward: Forward, params: Params, weights: Kernels, examples: Sequence[Example]) -> Tuned:
    """Tune the packed kernels of a block; they stay as they are where that would not make its error less.

    Args:
        tuning: what moves, and how.
        forward: of the block.
        params: its parameters, with packed kernels.
        weights: the float kernels of the layers that are tuned.
        examples: of which each makes one step in each epoch, in an order drawn anew.
    """
    tensors: Tensors = {path: kernel_of(params, path) for path in weights}
    steps = tuning.epochs * len(examples)
    variables = start(tuning, weights, tensors)
    state = init(tuning, steps, variables)
    order = np.random.default_rng(0)
    for _ in range(tuning.epochs):
        for number in order.permutation(len(examples)):
            # Not one jit: a block's own compiled program is used again, and no block is kept alive by a cache.
            kernels, pull = jax.vjp(partial(kernels_of, tuning, weights, tensors), variables)
            slopes = jax.grad(_loss)(kernels, forward, params, examples[number])
            variables, state = _move(tuning, steps, variables, state, *pull(slopes))
    tuned = packed(tuning, weights, tensors, variables)
    before, after = (_mean_error(forward, params, each, weights, examples) for each in (tensors, tuned))
    return Tuned(tuned, before, after) if after < before else Tuned(tensors, before, before)


@jax.jit
def block_error(found: Any, wanted: Any, mask: Bool[Array, "rows time"] | None) -> Float[Array, "2"]:
    """The sum of |found - wanted|^2 / |wanted|^2 over the vectors of real tokens, and how many there are.

    Relative for each, because what reads the residual stream normalizes it first, and because a few tokens of many
    models are a hundred times as large as all others.

    Args:
        found, wanted: states of a model, pytrees; arrays of integers in them do not count.
        mask: True for real tokens; an array whose first axes are not those of the mask counts as a whole.
    """
    sums = jnp.zeros(2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim:
            sums += _vector_errors(a, b, mask)
    return sums


def _vector_errors(
    found: Float[Array, "*places size"], wanted: Float[Array, "*places size"], mask: Bool[Array, "rows time"] | None
) -> Float[Array, "2"]:
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    energy = jnp.sum(wanted**2, axis=-1)
    real = jnp.isfinite(energy) & (energy > 0)  # not, say, a mask of minus infinity that goes from block to block
    if mask is not None and mask.shape == real.shape[:2]:
        real &= jnp.expand_dims(mask, range(2, real.ndim))
    error = jnp.sum(jnp.where(real[..., None], found - wanted, 0.0) ** 2, axis=-1)
    return jnp.stack([jnp.sum(error / jnp.where(real, energy, 1.0)), jnp.sum(real).astype(jnp.float32)])


def _sums(kernels: Kernels, forward: Forward, params: Params, example: Example) -> Float[Array, "2"]:
    for path, kernel in kernels.items():
        params = with_kernel(params, path, kernel)
    found = forward.run(params, example.state, example.mask, {})
    return block_error(found, example.target, example.mask)


def _loss(kernels: Kernels, forward: Forward, params: Params, example: Example) -> Float[Array, ""]:
    error, count = _sums(kernels, forward, params, example)
    return error / count


def _mean_error(
    forward: Forward, params: Params, tensors: Tensors, weights: Kernels, examples: Sequence[Example]
) -> float:
    """Of the whole calibration."""
    kernels = {path: tensor.dequantize(weights[path].dtype) for path, tensor in tensors.items()}
    sums = np.array([_sums(kernels, forward, params, example) for example in examples], np.float64)
    error, count = sums.sum(axis=0)
    return float(error / count)


@partial(jax.jit, static_argnums=0)
def start(tuning: Tuning, weights: Kernels, tensors: Tensors) -> dict[str, Variables]:
    """What moves, before the first step."""

    def one(weight: Array, tensor: QuantizedTensor) -> Variables:
        return tuning.start(weight.astype(jnp.float32), tensor)

    return {path: _each(one, weights[path])(weights[path], tensors[path]) for path in weights}


@partial(jax.jit, static_argnums=0)
def kernels_of(tuning: Tuning, weights: Kernels, tensors: Tensors, variables: dict[str, Variables]) -> Kernels:
    """The float kernels that the variables stand for."""

    def one(weight: Array, tensor: QuantizedTensor, moved: Variables) -> Array:
        codes, grid = tuning.values(moved, weight.astype(jnp.float32), tensor)
        return ((codes - of_rows(grid.zero, tensor)) * of_rows(grid.scale, tensor)).astype(weight.dtype)

    return {path: _each(one, weights[path])(weights[path], tensors[path], variables[path]) for path in weights}


@partial(jax.jit, static_argnums=0)
def packed(tuning: Tuning, weights: Kernels, tensors: Tensors, variables: dict[str, Variables]) -> Tensors:
    """The same, as they are stored."""

    def one(weight: Array, tensor: QuantizedTensor, moved: Variables) -> QuantizedTensor:
        codes, grid = tuning.values(moved, weight.astype(jnp.float32), tensor)
        return replace(
            tensor,
            codes=pack(codes.astype(jnp.uint8), tensor.spec.bits),
            scales=grid.scale.astype(tensor.scales.dtype),
            zeros=None if tensor.zeros is None else grid.zero.astype(tensor.zeros.dtype),
        )

    return {path: _each(one, weights[path])(weights[path], tensors[path], variables[path]) for path in weights}


@partial(jax.jit, static_argnums=(0, 1))
def init(tuning: Tuning, steps: int, variables: dict[str, Variables]) -> Any:
    """The optimizer's state before the first of so many steps."""
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        return tuning.optimizer(steps).init(variables)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _move(
    tuning: Tuning, steps: int, variables: dict[str, Variables], state: Any, slopes: dict[str, Variables]
) -> tuple[dict[str, Variables], Any]:
    return moved(tuning, steps, variables, state, slopes)


def moved(
    tuning: Tuning, steps: int, variables: dict[str, Variables], state: Any, slopes: dict[str, Variables]
) -> tuple[dict[str, Variables], Any]:
    """Variables and the optimizer's state after a step."""
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, state = tuning.optimizer(steps).update(slopes, state, variables)
        return optax.apply_updates(variables, updates), state


def _each(function: Callable[..., Any], weight: Array) -> Callable[..., Any]:
    """Of each expert, where weights are stacked."""
    return function if weight.ndim == 2 else jax.vmap(function)


def of_rows(array: Float[Array, "groups d_out"], tensor: QuantizedTensor) -> Float[Array, "d_in d_out"]:
    """What each group has, for each of its rows."""
    if tensor.group_of_row is not None:
        return array[tensor.group_of_row]
    # Not a gather, whose gradient is a scatter.
    groups, d_out = array.shape
    rows = jnp.broadcast_to(array[:, None], (groups, tensor.spec.group_rows(tensor.d_in), d_out))
    return rows.reshape(-1, d_out)[: tensor.d_in]


def straight_through(stored: Shaped[Array, "*shape"], exact: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The value of `stored`, bit for bit, with the gradient of `exact` (Bengio et al. 2013, arXiv 1308.3432)."""
    return jax.lax.stop_gradient(stored) + (exact - jax.lax.stop_gradient(exact))
