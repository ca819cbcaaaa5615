"""What a packed format is: how its config is read, which tensors a module has, and what they mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8, UInt32

from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]  # a module's tensors by the last part of their name
SCALE_DTYPES = ("F16", "BF16", "F32")
WORD_DTYPES = ("I32", "U32")
INDEX_DTYPES = ("I32", "I64")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor a packed module has.

    Attributes:
        shapes: any of them will do.
        dtypes: the same, by safetensors' names.
        optional: the module may lack it.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ModuleGrid:
    """All of a packed module but its codes; or of the same module of all experts, in arrays that are stacked.

    Attributes:
        spec: of the grid; symmetric only where the zero points stored are the middle code.
        scales: as stored, in the orientation of `QuantizedTensor`.
        zeros: true zero points; None for a symmetric grid.
        group_of_row: the group of each input; None where it is `i // group_size`.
        notes: what is unusual about the module, each a phrase.
    """

    spec: QuantSpec
    scales: Float[np.ndarray, "*experts groups d_out"]
    zeros: UInt8[np.ndarray, "*experts groups d_out"] | None
    group_of_row: Int32[np.ndarray, "*experts d_in"] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """A format as its config describes it. A problem with a module is a ValueError, a phrase without its name.

    Attributes:
        name: of the family, like "gptq".
        version: of the layout, for people.
        file: the config that was read, for errors.
        codes: the suffix of the tensor that holds the codes; a module that has one is packed.
        suffixes: of every tensor that a packed module may have, bias apart.
        spec_of: module -> its grid; None if the config leaves it float.
        layout: (spec, d_in, d_out) -> the tensors of such a module by suffix.
        read_grid: (tensors without the codes, spec, d_in, d_out) -> the grid.
        read_codes: (codes as stored, spec, d_in, d_out) -> codes as `QuantizedTensor` has them.
        notes: what is unusual about the config.
    """

    name: str
    version: str
    file: str
    codes: str
    suffixes: tuple[str, ...]
    spec_of: Callable[[str], QuantSpec | None]
    layout: Callable[[QuantSpec, int, int], dict[str, Stored]]
    read_grid: Callable[[Arrays, QuantSpec, int, int], ModuleGrid]
    read_codes: Callable[[Shaped[np.ndarray, "..."], QuantSpec, int, int], UInt32[np.ndarray, "words d_out"]]
    notes: tuple[str, ...] = field(default=())


def module_grid(
    spec: QuantSpec,
    d_in: int,
    *,
    scales: Float[np.ndarray, "groups d_out"],
    zeros: UInt8[np.ndarray, "groups d_out"] | None,
    group_of_row: Shaped[np.ndarray, "d_in"] | None = None,
    notes: tuple[str, ...] = (),
) -> ModuleGrid:
    """Check what a module stores and bring it into the form of `QuantizedTensor`.

    Args:
        spec: as the config has it.
        d_in: inputs.
        scales: as stored.
        zeros: true zero points, or None where the format stores none.
        group_of_row: as stored, or None.
        notes: what was found unusual so far.

    Raises:
        ValueError: scales are not finite, or groups out of range.
    """
    with np.errstate(all="ignore"):
        broken = int(scales.size - np.count_nonzero(np.isfinite(scales)))
    if broken:
        raise ValueError(f"{broken} of {scales.size} scales are NaN or infinity")
    group_of_row, found = _check_groups(spec, d_in, group_of_row)
    symmetric = spec.symmetric
    if zeros is not None and symmetric:
        middle = 2 ** (spec.bits - 1)
        if (zeros == middle).all():
            zeros = None
        else:
            values = np.unique(zeros)
            shown = f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
            notes = (*notes, f"is symmetric by its config, but stores zero points of {shown}, not {middle}")
            symmetric = False
    return ModuleGrid(
        spec=QuantSpec(bits=spec.bits, group_size=spec.group_size, symmetric=symmetric),
        scales=scales,
        zeros=zeros,
        group_of_row=group_of_row,
        notes=(*notes, *found),
    )


def stack_grids(grids: Sequence[ModuleGrid], d_in: int) -> ModuleGrid:
    """The grids of one module of all experts as one.

    Args:
        grids: in the order of the experts.
        d_in: inputs.

    Raises:
        ValueError: experts differ in bits, group size, or the dtype of scales.
    """
    specs = {(grid.spec.bits, grid.spec.group_size, grid.scales.dtype.name) for grid in grids}
    if len(specs) > 1:
        shown = " and ".join(f"{bits} bits in groups of {size} ({dtype})" for bits, size, dtype in sorted(specs))
        raise ValueError(f"experts have different grids, {shown}: they run as one only where these are the same")
    symmetric = all(grid.spec.symmetric for grid in grids)
    ordered = any(grid.group_of_row is not None for grid in grids)
    spec = replace(grids[0].spec, symmetric=symmetric)
    return ModuleGrid(
        spec=spec,
        scales=np.stack([grid.scales for grid in grids]),
        zeros=None if symmetric else np.stack([_zeros(grid) for grid in grids]),
        group_of_row=np.stack([_groups(grid, spec, d_in) for grid in grids]) if ordered else None,
    )


def _zeros(grid: ModuleGrid) -> UInt8[np.ndarray, "groups d_out"]:
    return np.full(grid.scales.shape, 2 ** (grid.spec.bits - 1), np.uint8) if grid.zeros is None else grid.zeros


def _groups(grid: ModuleGrid, spec: QuantSpec, d_in: int) -> Int32[np.ndarray, "d_in"]:
    return _in_order(spec, d_in) if grid.group_of_row is None else grid.group_of_row


def _in_order(spec: QuantSpec, d_in: int) -> Int32[np.ndarray, "d_in"]:
    return np.arange(d_in, dtype=np.int32) // np.int32(spec.group_rows(d_in))


def _check_groups(
    spec: QuantSpec, d_in: int, stored: Shaped[np.ndarray, "d_in"] | None
) -> tuple[Int32[np.ndarray, "d_in"] | None, tuple[str, ...]]:
    if stored is None:
        return None, ()
    groups = spec.groups(d_in)
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx spans {low} to {high}, but there are {groups} groups")
    if np.array_equal(stored, np.arange(d_in) // spec.group_rows(d_in)):
        return None, ()
    monotone = bool((np.diff(stored) >= 0).all())
    how = "monotone g_idx other than i // group_size" if monotone else "non-monotone g_idx (activation order)"
    return stored.astype(np.int32), (how,)


def quantized_tensor(grid: ModuleGrid, codes: UInt32[np.ndarray, "words d_out"], d_in: int) -> QuantizedTensor:
    """The weight as the rest of the library has it; arrays are handed to JAX without a float copy."""
    import jax.numpy as jnp

    return QuantizedTensor(
        codes=jnp.asarray(codes),
        scales=jnp.asarray(grid.scales),
        zeros=None if grid.zeros is None else jnp.asarray(grid.zeros),
        group_of_row=None if grid.group_of_row is None else jnp.asarray(grid.group_of_row),
        spec=grid.spec,
        d_in=d_in,
    )


def stored_zeros(tensor: QuantizedTensor) -> UInt8[np.ndarray, "groups d_out"]:
    """The true zero points of a weight, the middle code where the grid is symmetric.

    Raises:
        ValueError: they are not integers within the codes, which no format here can hold.
    """
    spec = tensor.spec
    if tensor.zeros is None:
        return np.full(tensor.scales.shape, 2 ** (spec.bits - 1), np.uint8)
    zeros = np.asarray(tensor.zeros)
    if zeros.dtype != np.uint8 or zeros.max(initial=0) > spec.max_code:
        raise ValueError(f"zero points are {zeros.dtype} up to {zeros.max()}, not integers of {spec.bits} bits.")
    return zeros


def row_groups(tensor: QuantizedTensor) -> Int32[np.ndarray, "d_in"]:
    """The group of each input."""
    if tensor.group_of_row is not None:
        return np.asarray(tensor.group_of_row, np.int32)
    return _in_order(tensor.spec, tensor.d_in)
