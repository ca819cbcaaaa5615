"""x @ packed weight by the first implementation that takes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels import reference, xla_tiled
from pallas_kernels.weight import PackedWeight, Problem, check_weight, describe

X_DTYPES = ("float32", "bfloat16", "float16")


class Implementation(NamedTuple):
    """One way to take the product.

    Attributes:
        check: raises NotImplementedError, naming its limit, for a problem it declines. `problem.tokens` is
            None when a weight is prepared: what then passes is taken for every number of tokens.
        prepare: the canonical layout -> a pytree of its own; itself where the canonical layout serves.
        run: (x [tokens, d_in], what `prepare` made) -> [tokens, d_out] in the dtype of `x`.
    """

    check: Callable[[Problem], None]
    prepare: Callable[[PackedWeight], Any]
    run: Callable[[Array, Any], Array]


def _as_it_is(weight: PackedWeight) -> PackedWeight:
    return weight


# In the order in which they are tried; the reference, last, declines nothing.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla_tiled": Implementation(xla_tiled.check, _as_it_is, xla_tiled.matmul),
    "reference": Implementation(reference.check, _as_it_is, reference.matmul),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class PreparedWeight:
    """A weight in the layout of one implementation.

    Attributes:
        arrays: what the implementation's `prepare` made.
        implementation: its name in `IMPLEMENTATIONS`. Static.
        d_in: inputs. Static.
        d_out: outputs. Static.
    """

    arrays: Any
    implementation: str = field(metadata={"static": True})
    d_in: int = field(metadata={"static": True})
    d_out: int = field(metadata={"static": True})


def prepare(weight: PackedWeight, implementation: str | None = None, x_dtype: Any = jnp.float32) -> PreparedWeight:
    """Bring a weight into the layout of the implementation that will run it: once, when a model is loaded.

    Args:
        weight: the canonical layout. Drop it afterwards where it is not what the implementation keeps.
        implementation: a name in `IMPLEMENTATIONS`; None for the first that takes the weight here.
        x_dtype: the dtype of the activations to come.

    Raises:
        ValueError: an unknown name, or arrays that do not fit together.
        NotImplementedError: the implementation, or every one, declines; the reasons are given.
    """
    check_weight(weight)
    name = _choose(describe(weight, None, x_dtype), implementation)
    arrays = IMPLEMENTATIONS[name].prepare(weight)
    return PreparedWeight(arrays=arrays, implementation=name, d_in=weight.d_in, d_out=weight.d_out)


def quantized_matmul(
    x: Shaped[Array, "*batch d_in"],
    weight: PackedWeight | PreparedWeight,
    implementation: str | None = None,
) -> Float[Array, "*batch d_out"]:
    """`x @ weight`, summed in float32, in the dtype of `x`; differentiable in `x`.

    Args:
        x: float32, bfloat16 or float16.
        weight: canonical, or prepared for one implementation.
        implementation: a name in `IMPLEMENTATIONS`; None for the one the weight is prepared for, else the
            first that takes the problem.

    Raises:
        TypeError: a dtype of `x` that is not supported.
        ValueError: an unknown name, a weight prepared for another implementation, or shapes that disagree.
        NotImplementedError: the implementation, or every one, declines; the reasons are given.
    """
    if x.dtype.name not in X_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: convert it to one of {list(X_DTYPES)}.")
    if x.shape[-1] != weight.d_in:
        raise ValueError(f"x has {x.shape[-1]} inputs in its last axis, but the weight has d_in={weight.d_in}.")
    rows = x.reshape(-1, weight.d_in)
    if isinstance(weight, PreparedWeight):
        name, arrays = weight.implementation, weight.arrays
        _known(name)
        if implementation not in (None, name):
            raise ValueError(
                f"the weight is prepared for {name!r}, not for implementation={implementation!r}: prepare it "
                "again from the canonical layout."
            )
    else:
        check_weight(weight)
        name = _choose(describe(weight, rows.shape[0], x.dtype), implementation)
        arrays = IMPLEMENTATIONS[name].prepare(weight)
    return _run(rows, arrays, run=IMPLEMENTATIONS[name].run).reshape(*x.shape[:-1], weight.d_out)


def explain(problem: Problem) -> dict[str, str]:
    """For each implementation, as they are tried: "runs", or why it declines; the first that runs is used."""
    return {name: _refusal(name, problem) or "runs" for name in IMPLEMENTATIONS}


def _choose(problem: Problem, implementation: str | None) -> str:
    names = [implementation] if implementation is not None else list(IMPLEMENTATIONS)
    refusals = []
    for name in names:
        _known(name)
        refusal = _refusal(name, problem)
        if refusal is None:
            return name
        refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation takes {problem}: {'; '.join(refusals)}")


def _known(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: use one of {list(IMPLEMENTATIONS)}.")


def _refusal(name: str, problem: Problem) -> str | None:
    try:
        IMPLEMENTATIONS[name].check(problem)
    except NotImplementedError as error:
        return str(error)
    return None


@partial(jax.jit, static_argnames="run")
def _run(
    x: Float[Array, "tokens d_in"], arrays: Any, *, run: Callable[[Array, Any], Array]
) -> Float[Array, "tokens d_out"]:
    return run(x, arrays)
