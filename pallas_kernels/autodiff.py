"""Gradients and batching for kernels that JAX can do neither through."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

Product = Callable[[Array, Any], Array]  # (rows [tokens, n], a weight's arrays) -> [tokens, m]


@lru_cache
def differentiable(run: Product, transposed: Product, rows_apart: bool = True) -> Product:
    """`run` with the gradient in `x` that `transposed` gives, usable under jit, grad, vmap and checkpoint.

    Args:
        run: (x [tokens, d_in], arrays) -> x @ weight.
        transposed: (dy [tokens, d_out], arrays) -> dy @ weight.T, in the dtype of dy.
        rows_apart: as for `batchable`.

    Returns:
        The same function for the same arguments, so that what is compiled with it is found again. It has no
        gradient in the weight's arrays: asking for one is a NotImplementedError.
    """
    forward, backward = batchable(run, rows_apart), batchable(transposed, rows_apart)

    @jax.custom_vjp
    def product(x: Float[Array, "tokens d_in"], arrays: Any) -> Float[Array, "tokens d_out"]:
        return forward(x, arrays)

    def keep(x, arrays):  # type: ignore[no-untyped-def]
        if any(leaf.perturbed for leaf in jax.tree.leaves(arrays)):
            raise NotImplementedError(
                "this kernel has no gradient in the scales and zeros of a weight: differentiate in x alone, or "
                "pass implementation='xla_tiled'."
            )
        values = jax.tree.map(lambda leaf: leaf.value, arrays)
        return forward(x.value, values), values

    def pull_back(arrays, dy):  # type: ignore[no-untyped-def]
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            dy = jnp.zeros(dy.shape, dy.dtype)
        return backward(dy, arrays), None

    product.defvjp(keep, pull_back, symbolic_zeros=True)
    return product


def batchable(function: Product, rows_apart: bool = True) -> Product:
    """`function` under vmap: rows of a batch are tokens too; batched weights are taken one after another.

    Args:
        function: a product.
        rows_apart: whether a row's result depends on that row alone, wherever it is; else the elements of every
            batch are taken one after another.
    """

    @custom_vmap
    def product(x: Float[Array, "tokens n"], arrays: Any) -> Float[Array, "tokens m"]:
        return function(x, arrays)

    @product.def_vmap
    def batched(size, which, x, arrays):  # type: ignore[no-untyped-def]
        x_batched, arrays_batched = which
        leaves, tree = jax.tree.flatten(arrays)
        moving = jax.tree.leaves(arrays_batched)
        if rows_apart and not any(moving):
            y = product(x.reshape(-1, x.shape[-1]), arrays)
            return y.reshape(size, -1, y.shape[-1]), True

        def one(inputs):  # type: ignore[no-untyped-def]
            x_own, own = inputs
            mine = iter(own)
            merged = [next(mine) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)]
            return product(x_own if x_batched else x, jax.tree.unflatten(tree, merged))

        own = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        return jax.lax.map(one, (x if x_batched else None, own)), True

    return product
