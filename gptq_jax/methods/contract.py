"""What a method promises of its statistics and its tuning, tried on a few numbers before the long work."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptq_jax.methods.base import LayerBatch, Method, Tuning
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec

_D_IN, _D_OUT = 8, 4


@lru_cache
def check_statistics(method: Method) -> None:
    """Raise ValueError saying which promise of `Method` its `init` or `update` breaks.

    Statistics are a pytree of arrays, zeros before the first batch, of the same shapes and dtypes after each, and sums
    over tokens: what several batches give is the sum of what each gives alone.
    """
    whose = f"method {method.name!r}"
    empty = method.init(_D_IN, _D_OUT)
    for path, leaf in jax.tree_util.tree_leaves_with_path(empty):
        if not isinstance(leaf, jax.Array | np.ndarray):
            where = f"statistics{jax.tree_util.keystr(path)} of type {type(leaf).__name__}"
            raise ValueError(f"{whose}: init returned {where}, but must return a pytree of arrays.")
        if np.any(np.asarray(leaf)):
            raise ValueError(
                f"{whose}: init returned statistics that are not zeros, which is what no tokens must give."
            )
    rng = np.random.default_rng(0)
    first, second = (_batch(rng, tokens, method.needs_float_inputs) for tokens in (3, 5))
    after = [method.update(method.init(_D_IN, _D_OUT), batch) for batch in (first, second)]
    if (want := _shapes(empty)) != (have := _shapes(after[0])):
        raise ValueError(f"{whose}: update returned statistics of {have}, but must keep the {want} of init.")
    together = method.update(after[0], second)
    for total, *parts in zip(*map(jax.tree.leaves, (together, *after)), strict=True):
        if not np.allclose(total, np.add(*map(np.asarray, parts)), rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{whose}: update must add to its statistics: two batches gave something else than the sum of what "
                "each gives, and devices could not add up theirs."
            )


@lru_cache
def check_tuning(tuning: Tuning) -> None:
    """Raise ValueError saying which promise of `Tuning` its functions break.

    Before the first step they give the packed weight as it is; codes and grid are float32 arrays of its shapes; the
    optimizer is one of optax, or like it.
    """
    whose = f"tuning {tuning.name!r}"
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((_D_IN, _D_OUT)), jnp.float32)
    for symmetric in (True, False):
        spec = QuantSpec(bits=4, group_size=_D_IN // 2, symmetric=symmetric)
        tensor = round_to_nearest(weight, spec)
        variables = tuning.start(weight, tensor)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
            if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                where = f"variables{jax.tree_util.keystr(path)} of {getattr(leaf, 'dtype', type(leaf).__name__)}"
                raise ValueError(f"{whose}: start returned {where}, but must return a pytree of floating arrays.")
        codes, grid = tuning.values(variables, weight, tensor)
        shapes = codes.shape, grid.scale.shape, grid.zero.shape
        if shapes != (wanted := (weight.shape, tensor.scales.shape, tensor.scales.shape)):
            raise ValueError(f"{whose}: values returned codes, scales and zeros of {shapes}, but must keep {wanted}.")
        found = (codes - jnp.repeat(grid.zero, 4, axis=0)) * jnp.repeat(grid.scale, 4, axis=0)
        if not np.allclose(found, tensor.dequantize(), rtol=1e-5, atol=1e-6):
            raise ValueError(f"{whose}: values of what start returned are another weight, but must be the one packed.")
        if not isinstance(made := tuning.optimizer(1), optax.GradientTransformation):
            raise ValueError(f"{whose}: optimizer returned {type(made).__name__}, not an optax.GradientTransformation.")


def _batch(rng: np.random.Generator, tokens: int, with_float: bool) -> LayerBatch:
    rows = [jnp.asarray(rng.standard_normal((tokens, _D_IN)), jnp.float32) for _ in range(2)]
    return LayerBatch(rows[0], rows[1] if with_float else None)


def _shapes(stats: Any) -> str:
    """Structure, shapes and dtypes, to be compared and shown."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", stats))
