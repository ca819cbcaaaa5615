"""x @ packed weight by the first implementation that takes it."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from pallas_kernels import grouped, reference, xla_tiled
from pallas_kernels.autodiff import Product, differentiable
from pallas_kernels.weight import PackedWeight, Problem, check_weight, describe, target

X_DTYPES = ("float32", "bfloat16", "float16")


class Implementation(NamedTuple):
    """One way to take the product.

    Attributes:
        check: raises NotImplementedError, naming its limit, for a problem it declines. `problem.tokens` is
            None when a weight is prepared: what then passes is taken for every number of tokens.
        run: (x [tokens, d_in], arrays) -> [tokens, d_out] in the dtype of `x`; arrays are what `prepare` made.
        prepare: (the canonical layout, dtype of x) -> a pytree of its own; it may still decline, of values that
            `check` cannot know. None where the canonical layout serves, and is kept as it is.
        transposed: (dy [tokens, d_out], arrays) -> dy @ weight.T [tokens, d_in] in the dtype of `dy`, for an
            implementation that JAX cannot differentiate or batch; None for one that it can.
        grouped: (x, stacked arrays, group_sizes) -> [tokens, d_out], differentiable in `x`; None where experts
            are declined.
        fallback: whether using it on a GPU deserves a warning.
    """

    check: Callable[[Problem], None]
    run: Product
    prepare: Callable[[PackedWeight, Any], Any] | None = None
    transposed: Product | None = None
    grouped: Callable[[Array, Any, Array], Array] | None = None
    fallback: bool = False


def _kernel(module: str) -> Implementation:
    """The implementation in a module of `mosaic_gpu`, imported when it is first asked for."""

    def late(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return getattr(importlib.import_module(f"pallas_kernels.mosaic_gpu.{module}"), name)(*args)

        return call

    return Implementation(late("check"), late("run"), late("prepare"), late("transposed"), late("grouped"))


# In the order in which they are tried; the reference, last, declines nothing.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_hopper": _kernel("hopper"),
    "mosaic_ampere": _kernel("ampere"),
    "xla_tiled": Implementation(xla_tiled.check, xla_tiled.matmul, grouped=grouped.by_blocks, fallback=True),
    "reference": Implementation(reference.check, reference.matmul, grouped=grouped.by_ragged_dot, fallback=True),
}
_warned: set[str] = set()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class PreparedWeight:
    """A weight in the layout of one implementation, for one kind of device.

    Attributes:
        arrays: what the implementation's `prepare` made.
        implementation: its name in `IMPLEMENTATIONS`. Static.
        problem: what it was prepared for; `tokens` is None. Static.
    """

    arrays: Any
    implementation: str = field(metadata={"static": True})
    problem: Problem = field(metadata={"static": True})

    @property
    def d_in(self) -> int:
        """Inputs."""
        return self.problem.d_in

    @property
    def d_out(self) -> int:
        """Outputs."""
        return self.problem.d_out


def prepare(weight: PackedWeight, implementation: str | None = None, x_dtype: Any = jnp.float32) -> PreparedWeight:
    """Bring a weight into the layout of the implementation that will run it: once, when a model is loaded.

    Args:
        weight: the canonical layout, or a stack of experts for `grouped_matmul`. Drop it afterwards where it is
            not what the implementation keeps.
        implementation: a name in `IMPLEMENTATIONS`; None for the first that takes the weight here.
        x_dtype: the dtype of the activations to come.

    Raises:
        ValueError: an unknown name, or arrays that do not fit together.
        NotImplementedError: the implementation, or every one, declines; the reasons are given.
    """
    check_weight(weight)
    problem = describe(weight, None, x_dtype)
    name, arrays = _first(weight, problem, implementation)
    return PreparedWeight(arrays=arrays, implementation=name, problem=problem)


def quantized_matmul(
    x: Shaped[Array, "*batch d_in"],
    weight: PackedWeight | PreparedWeight,
    implementation: str | None = None,
    bias: Float[Array, "d_out"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x @ weight + bias`, summed in float32, in the dtype of `x`; differentiable in `x`.

    Args:
        x: float32, bfloat16 or float16.
        weight: canonical, or prepared for one implementation.
        implementation: a name in `IMPLEMENTATIONS`; None for the one the weight is prepared for, else the
            first that takes the problem.
        bias: added after the product, in its dtype.

    Raises:
        TypeError: a dtype of `x` that is not supported.
        ValueError: an unknown name, a weight prepared for another implementation or device, or shapes that
            disagree.
        NotImplementedError: the implementation, or every one, declines; the reasons are given.
    """
    check_x(x, weight)
    if bias is not None and bias.shape != (weight.d_out,):
        raise ValueError(f"bias has shape {bias.shape}: pass ({weight.d_out},), one for each output.")
    rows = x.reshape(-1, weight.d_in)
    problem = _describe_call(weight, rows.shape[0], x.dtype)
    if isinstance(weight, PackedWeight) and problem.experts is not None:
        raise ValueError(
            f"weight is a stack of {problem.experts}: use grouped_matmul, or jax.vmap over it and the inputs of each."
        )
    name, arrays = _arrays(weight, problem, implementation)
    y = _run(rows, arrays, run=_product(IMPLEMENTATIONS[name])) if rows.shape[0] else jnp.zeros((0,), x.dtype)
    y = y.reshape(*x.shape[:-1], weight.d_out)
    if bias is None:
        return y
    return y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


def grouped_matmul(
    x: Shaped[Array, "*tokens d_in"],
    weight: PackedWeight | PreparedWeight,
    group_sizes: Shaped[Array, "experts"],
    implementation: str | None = None,
) -> Float[Array, "tokens d_out"]:
    """Each row of `x` times the weight of its expert, as `jax.lax.ragged_dot`; differentiable in `x`.

    Args:
        x: float32, bfloat16 or float16, sorted by expert.
        weight: a stack of experts, canonical or prepared: every array has a leading axis.
        group_sizes: rows of each expert, which come one after another; rows past the last are zero in the result.
        implementation: as for `quantized_matmul`.

    Raises:
        TypeError, ValueError, NotImplementedError: as for `quantized_matmul`.
    """
    check_x(x, weight)
    problem = _describe_call(weight, x.shape[0], x.dtype, one=False)
    grouped.check_groups(x, problem.experts, group_sizes)
    name, arrays = _arrays(weight, problem, implementation)
    if not x.shape[0]:
        return jnp.zeros((0, weight.d_out), x.dtype)
    return _run_grouped(x, arrays, group_sizes, run=IMPLEMENTATIONS[name].grouped)


def explain(problem: Problem) -> dict[str, str]:
    """For each implementation, as they are tried: "runs", or why it declines; the first that runs is used."""
    return {name: _refusal(name, problem) or "runs" for name in IMPLEMENTATIONS}


def _describe_call(weight: PackedWeight | PreparedWeight, tokens: int, x_dtype: Any, *, one: bool = True) -> Problem:
    """The problem of a call; `one` for that of one weight, where a prepared stack is mapped over."""
    if isinstance(weight, PackedWeight):
        check_weight(weight)
        return describe(weight, tokens, x_dtype)
    platform, capability = target()
    problem = replace(
        weight.problem, tokens=tokens, x_dtype=jnp.dtype(x_dtype).name, platform=platform, capability=capability
    )
    return replace(problem, experts=None) if one else problem


def check_x(x: Array, weight: Any) -> None:
    """Raise TypeError or ValueError where `x` is of a dtype or of inputs that the weight does not take."""
    if x.dtype.name not in X_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: convert it to one of {list(X_DTYPES)}.")
    if x.ndim < 1 or x.shape[-1] != weight.d_in:
        last = x.shape[-1] if x.ndim else "no"
        raise ValueError(f"x has {last} inputs in its last axis, but the weight has d_in={weight.d_in}.")


def _arrays(weight: PackedWeight | PreparedWeight, problem: Problem, implementation: str | None) -> tuple[str, Any]:
    """The implementation of a call, and the weight in its layout."""
    if isinstance(weight, PackedWeight):
        name, arrays = _first(weight, problem, implementation)
        if problem.platform == "gpu" and IMPLEMENTATIONS[name].prepare is not None:
            _warn_once(f"a weight is repacked for {name} at every call: pass what pallas_kernels.api.prepare returns.")
        return name, arrays
    name = weight.implementation
    _known(name)
    if implementation not in (None, name):
        raise ValueError(
            f"the weight is prepared for {name!r}, not for implementation={implementation!r}: prepare it "
            "again from the canonical layout."
        )
    if weight.problem.device != problem.device:
        raise ValueError(
            f"the weight is prepared for {name!r} on {weight.problem.device!r}, but JAX computes on "
            f"{problem.device!r}: prepare it again from the canonical layout."
        )
    if refusal := _refusal(name, problem):
        raise NotImplementedError(f"the weight is prepared for {name!r}, which declines {problem}: {refusal}")
    return name, weight.arrays


def _first(weight: PackedWeight, problem: Problem, implementation: str | None) -> tuple[str, Any]:
    """The first implementation that takes the problem, and the weight in its layout."""
    names = [implementation] if implementation is not None else list(IMPLEMENTATIONS)
    refusals: list[str] = []
    for name in names:
        _known(name)
        refusal, chosen = _refusal(name, problem), IMPLEMENTATIONS[name]
        if refusal is None:
            try:
                arrays = weight if chosen.prepare is None else chosen.prepare(weight, jnp.dtype(problem.x_dtype))
            except NotImplementedError as error:
                refusal = str(error)
            else:
                if refusals and chosen.fallback and problem.platform == "gpu":
                    _warn_once(f"packed weights run through {name} on this GPU, slowly: {'; '.join(refusals)}")
                return name, arrays
        refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation takes {problem}: {'; '.join(refusals)}")


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


def _known(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: use one of {list(IMPLEMENTATIONS)}.")


def _refusal(name: str, problem: Problem) -> str | None:
    try:
        if problem.experts is not None and IMPLEMENTATIONS[name].grouped is None:
            raise NotImplementedError(f"has no grouped kernel for {problem.experts} stacked experts.")
        IMPLEMENTATIONS[name].check(problem)
    except NotImplementedError as error:
        return str(error)
    return None


def _product(chosen: Implementation) -> Product:
    return chosen.run if chosen.transposed is None else differentiable(chosen.run, chosen.transposed)


@partial(jax.jit, static_argnames="run")
def _run(x: Float[Array, "tokens d_in"], arrays: Any, *, run: Product) -> Float[Array, "tokens d_out"]:
    return run(x, arrays)


@partial(jax.jit, static_argnames="run")
def _run_grouped(
    x: Float[Array, "tokens d_in"], arrays: Any, group_sizes: Integer[Array, "experts"], *, run: Callable[..., Array]
) -> Float[Array, "tokens d_out"]:
    return run(x, arrays, group_sizes)
