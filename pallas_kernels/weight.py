"""A packed weight as arrays, and the static description by which an implementation accepts or declines it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.packing import SUPPORTED_BITS, packed_words


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class PackedWeight:
    """The canonical layout: `weight[i, j] = (code[i, j] - zero[g(i), j]) * scale[g(i), j]`.

    Attributes:
        codes: packed along the inputs by `packing.pack`.
        scales: floating, one for each group and output.
        zeros: integer or real zero points; None for `2**(bits-1)`.
        group_of_row: the group of each input; None for `i // group_rows`.
        bits: 2, 3, 4 or 8. Static.
        group_rows: inputs in a full group; the last group may be shorter. Static.
        d_in: inputs. Static.
    """

    codes: UInt32[Array, "words d_out"]
    scales: Float[Array, "groups d_out"]
    zeros: Shaped[Array, "groups d_out"] | None = None
    group_of_row: Int32[Array, "d_in"] | None = None
    bits: int = field(metadata={"static": True})
    group_rows: int = field(metadata={"static": True})
    d_in: int = field(metadata={"static": True})

    @property
    def d_out(self) -> int:
        """Outputs."""
        return self.codes.shape[-1]

    @property
    def groups(self) -> int:
        """Groups in a column, as `d_in` and `group_rows` have it."""
        return -(-self.d_in // self.group_rows)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that is known of a product before its arrays are: shapes, the grid, and where it runs.

    Attributes:
        tokens: rows of `x`; None where they are not known yet, as when a weight is prepared.
        x_dtype: the dtype of `x`.
        d_in: inputs.
        d_out: outputs.
        bits: 2, 3, 4 or 8.
        group_rows: inputs in a full group.
        zeros: None for a symmetric grid, otherwise the dtype of the zero points.
        permuted: whether the group of each input is stored (activation order).
        platform: "cpu", "gpu" or "tpu".
        capability: a GPU's compute capability, like "9.0"; None elsewhere.
        experts: weights that are stacked; None for one.
    """

    tokens: int | None
    x_dtype: str
    d_in: int
    d_out: int
    bits: int
    group_rows: int
    zeros: str | None
    permuted: bool
    platform: str
    capability: str | None = None
    experts: int | None = None

    @property
    def device(self) -> str:
        """Where it runs, in words."""
        return self.platform if self.capability is None else f"{self.platform} {self.capability}"


def target() -> tuple[str, str | None]:
    """The platform, and a GPU's compute capability, of the device that JAX computes on by default."""
    chosen: Any = jax.config.values["jax_default_device"]
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return chosen.platform, getattr(chosen, "compute_capability", None)


def describe(weight: PackedWeight, tokens: int | None, x_dtype: Any, platform: str | None = None) -> Problem:
    """The problem of `tokens` rows of `x_dtype` times `weight`, on `platform` or where JAX computes."""
    here, capability = target()
    return Problem(
        tokens=tokens,
        x_dtype=jnp.dtype(x_dtype).name,
        d_in=weight.d_in,
        d_out=weight.d_out,
        bits=weight.bits,
        group_rows=weight.group_rows,
        zeros=None if weight.zeros is None else weight.zeros.dtype.name,
        permuted=weight.group_of_row is not None,
        platform=platform or here,
        capability=capability if platform in (None, here) else None,
        experts=weight.codes.shape[0] if weight.codes.ndim == 3 else None,
    )


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of the same inputs as one, their outputs side by side: `x @ w0, x @ w1, ...` in one product.

    Args:
        weights: of one grid: the same d_in, bits, groups, dtypes, and the same group of each input.

    Raises:
        ValueError: there are none, or one has another grid than the first.
    """
    if not weights:
        raise ValueError("weights is empty: pass at least one.")
    first = weights[0]
    for index, weight in enumerate(weights[1:], start=1):
        if found := difference(first, weight):
            raise ValueError(f"weights[{index}] differs from weights[0] in {found}: leave it apart.")

    def side_by_side(name: str) -> Array:
        return jnp.concatenate([getattr(weight, name) for weight in weights], axis=-1)

    zeros = None if first.zeros is None else side_by_side("zeros")
    return replace(first, codes=side_by_side("codes"), scales=side_by_side("scales"), zeros=zeros)


def difference(one: PackedWeight, other: PackedWeight) -> str | None:
    """Why two weights cannot be concatenated; None where they can. The order of inputs must be known, not traced."""
    for name in ("d_in", "bits", "group_rows"):
        if getattr(one, name) != getattr(other, name):
            return f"{name}={getattr(other, name)} (not {getattr(one, name)})"
    for name in ("scales", "zeros", "group_of_row"):
        mine, its = getattr(one, name), getattr(other, name)
        if (mine is None) != (its is None) or (mine is not None and mine.dtype != its.dtype):
            return f"the dtype or presence of {name}"
    mine, its = one.group_of_row, other.group_of_row
    if mine is not its and not np.array_equal(np.asarray(mine), np.asarray(its)):
        return "group_of_row"
    return None


def check_weight(weight: PackedWeight) -> None:
    """Raise ValueError or TypeError, naming the first array whose shape or dtype breaks the layout.

    Stacked weights have their number first in the shape of every array.
    """
    if weight.bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={weight.bits!r} is not supported: use one of {list(SUPPORTED_BITS)}.")
    if weight.d_in < 1 or weight.group_rows < 1:
        raise ValueError(
            f"d_in={weight.d_in} and group_rows={weight.group_rows} must be positive: for one group in a "
            "whole column pass group_rows=d_in."
        )
    if weight.codes.dtype != jnp.uint32:
        raise TypeError(f"codes are {weight.codes.dtype}, not uint32: make them with packing.pack.")
    words, groups = packed_words(weight.d_in, weight.bits), weight.groups
    expected: dict[str, tuple[int, ...]] = {"codes": (words, weight.d_out), "scales": (groups, weight.d_out)}
    if weight.zeros is not None:
        expected["zeros"] = (groups, weight.d_out)
    if weight.group_of_row is not None:
        expected["group_of_row"] = (weight.d_in,)
    stack = weight.codes.shape[:-2]
    for name, shape in expected.items():
        found = getattr(weight, name).shape
        if found != (*stack, *shape):
            raise ValueError(
                f"{name} has shape {found}, but {weight.bits} bits with d_in={weight.d_in}, "
                f"group_rows={weight.group_rows} and d_out={weight.d_out} need {(*stack, *shape)}."
            )
