"""What a method promises of its statistics, solver and tuning, tried on little before the long work."""

import importlib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptq_jax.methods.base import Finish, LayerBatch, Method, Rewrite, Solution, Tuning
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor, check_layout

_D_IN, _D_OUT = 8, 4
_NOT_THEIRS = {Path(__file__).parents[1], Path(jax.__file__).parent, Path(importlib.__file__).parent}


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """What goes wrong inside is `what`'s fault, unless it says itself, by ValueError or NotImplementedError."""
    try:
        yield
    except (ValueError, NotImplementedError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{what} failed{_place(error)}: {type(error).__name__}: {text[:300]}") from error


def _place(error: Exception) -> str:
    """The last line that is neither ours nor JAX's, nor Python's way to a module."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if not frame.filename.startswith("<frozen") and not _NOT_THEIRS & set(file.parents):
            return f" in {file.name}, line {frame.lineno}"
    return ""


def check_contract(method: Any, grids: Iterable[QuantSpec]) -> None:
    """Raise TypeError or ValueError saying which promise a method or its tuning breaks; `solve` is tried on `grids`."""
    check_method(method)
    check_statistics(method)
    if method.tuning is not None:
        check_tuning(method.tuning)
    for spec in dict.fromkeys(grids):
        check_solve(method, spec)


def check_method(method: Any) -> None:
    """Raise TypeError if it or what goes with it is something else than it must be, or cannot be hashed."""
    if not isinstance(method, Method):
        remedy = "call it, as in gptq()" if callable(method) else "pass e.g. gptq()"
        raise TypeError(f"method is {getattr(method, '__name__', repr(method))!s}, not a gptq_jax.Method: {remedy}.")
    for name, kind in (("rewrite", Rewrite), ("tuning", Tuning), ("finish", Finish)):
        if not isinstance(part := getattr(method, name), kind | None):
            raise TypeError(
                f"method {method.name!r} has a {name} that is {_kind(part)}, not a gptq_jax.{kind.__name__}."
            )
    try:
        hash(method)
    except TypeError as error:
        raise TypeError(f"method {method.name!r}: {error}; settings are pairs of a name and a plain value.") from None


@lru_cache
def check_statistics(method: Method) -> None:
    """Raise ValueError saying which promise of `Method` its `init` or `update` breaks.

    Statistics are a pytree of arrays, zeros before the first batch, of the same shapes and dtypes after each, and sums
    over tokens: what several batches give is the sum of what each gives alone.
    """
    whose = f"method {method.name!r}"
    with blaming(f"{whose}: init({_D_IN}, {_D_OUT})"):
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
    with blaming(f"{whose}: update, of a batch of inputs [3, {_D_IN}],"):
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
def check_solve(method: Method, spec: QuantSpec) -> None:
    """Raise ValueError saying which promise of `Method` its `solve` breaks on a grid, from shapes alone.

    What `solve` itself refuses, by ValueError or NotImplementedError, is told in its own words.
    """
    whose = f"method {method.name!r}"
    d_in = 2 * spec.group_size if spec.group_size > 0 else 128  # whole groups, which every solver should take
    d_out = 2 * d_in
    weight = jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)
    stats = jax.eval_shape(partial(method.init, d_in, d_out))
    with blaming(f"{whose}: solve, of a weight [{d_in}, {d_out}],"):
        solution = jax.eval_shape(lambda weight, stats: method.solve(weight, stats, spec), weight, stats)
    tensor, _ = check_solution(solution, weight.shape, spec, whose)
    check_layout(tensor, f"{whose}: solve")


def check_solution(
    solution: Any, shape: tuple[int, ...], spec: QuantSpec, whose: str
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """The tensor and the notes of what `solve` returned.

    Args:
        solution: that, of arrays or of their shapes.
        shape: of the weight.
        spec: the grid that was asked for.
        whose: the method, for messages.

    Raises:
        ValueError: it is something else, or of another shape, grid or dtype of scales.
    """
    tensor, notes = solution if isinstance(solution, Solution) else (solution, {})
    if not isinstance(tensor, QuantizedTensor):
        raise ValueError(f"{whose}: solve returned {_kind(tensor)}, but must return a QuantizedTensor or a Solution.")
    if not isinstance(notes, dict):
        raise ValueError(f"{whose}: solve returned notes of {_kind(notes)}, but must return a dict of scalars.")
    for name, note in notes.items():
        if np.shape(note) != shape[:-2]:
            raise ValueError(f"{whose}: solve returned the note {name!r} of {_kind(note)}, but must return scalars.")
    if tensor.shape != shape:
        raise ValueError(f"{whose}: solve returned a tensor of shape {tensor.shape}, but must keep {shape}.")
    if tensor.spec != spec:
        raise ValueError(f"{whose}: solve returned a tensor on {tensor.spec}, but must keep {spec}.")
    if tensor.scales.dtype != (wanted := spec.scale_dtype or tensor.scales.dtype):
        raise ValueError(
            f"{whose}: solve returned scales of {tensor.scales.dtype}, but must keep the spec's scale_dtype={wanted!r}."
        )
    return tensor, notes


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


def _kind(value: Any) -> str:
    """For messages: what it is."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return type(value).__name__


def _batch(rng: np.random.Generator, tokens: int, with_float: bool) -> LayerBatch:
    rows = [jnp.asarray(rng.standard_normal((tokens, _D_IN)), jnp.float32) for _ in range(2)]
    return LayerBatch(rows[0], rows[1] if with_float else None)


def _shapes(stats: Any) -> str:
    """Structure, shapes and dtypes, to be compared and shown."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", stats))
