"""The quantized weight that everything passes around."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from gptq_jax.spec import QuantSpec
from pallas_kernels import reference
from pallas_kernels.packing import packed_words


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class QuantizedTensor:
    """A packed weight: `weight[i, j] = (code[i, j] - zero[g(i), j]) * scale[g(i), j]`.

    Or the weights of experts, stacked: every array has a leading dimension.

    Attributes:
        codes: packed along the inputs by `pallas_kernels.packing.pack`, the layout of Hugging Face's `qweight`.
        scales: floating, one for each group and output.
        zeros: uint8 (or floating, for methods that fit real ones); None for a symmetric grid: `2**(bits-1)`.
        group_of_row: the group of each input; None for rows in order, `i // spec.group_rows(d_in)`.
        spec: the grid. Static.
        d_in: inputs, which the packed words alone do not tell. Static.
    """

    codes: UInt32[Array, "*experts words d_out"]
    scales: Float[Array, "*experts groups d_out"]
    zeros: Shaped[Array, "*experts groups d_out"] | None
    group_of_row: Int32[Array, "*experts d_in"] | None
    spec: QuantSpec = field(metadata={"static": True})
    d_in: int = field(metadata={"static": True})

    @property
    def d_out(self) -> int:
        """Outputs."""
        return self.codes.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""
        return (*self.codes.shape[:-2], self.d_in, self.d_out)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all arrays for each weight."""
        return 8 * self.nbytes / int(np.prod(self.shape))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*experts d_in d_out"]:
        """The float weight."""
        return _dequantize(self, jnp.dtype(dtype).name)


@partial(jax.jit, static_argnames="dtype")
def _dequantize(tensor: QuantizedTensor, dtype: str) -> Float[Array, "*experts d_in d_out"]:
    """As one program, which keeps no unpacked codes; one expert after another, so that only the result is so large."""
    if tensor.codes.ndim > 2:
        return jax.lax.map(partial(_dequantize, dtype=dtype), tensor)
    return reference.dequantize(
        tensor.codes,
        tensor.scales,
        tensor.zeros,
        tensor.group_of_row,
        bits=tensor.spec.bits,
        group_rows=tensor.spec.group_rows(tensor.d_in),
        d_in=tensor.d_in,
    ).astype(dtype)


@jax.jit
def all_finite(array: Shaped[Array, "..."]) -> Bool[Array, ""]:
    """Whether no number is NaN or infinite."""
    return jnp.all(jnp.isfinite(array))


def experts_of(tensor: QuantizedTensor) -> Iterator[QuantizedTensor]:
    """Each weight of a stack, as views of its arrays in the memory of the host."""
    host = jax.tree.map(np.asarray, tensor)
    return (jax.tree.map(itemgetter(expert), host) for expert in range(tensor.codes.shape[0]))


def split_outputs(tensor: QuantizedTensor, sizes: Sequence[int]) -> list[QuantizedTensor]:
    """Cut a weight into weights of `sizes` outputs each."""
    return _split_outputs(tensor, tuple(sizes))


@partial(jax.jit, static_argnums=1)
def _split_outputs(tensor: QuantizedTensor, sizes: tuple[int, ...]) -> list[QuantizedTensor]:
    starts = accumulate(sizes, initial=0)
    return [take_outputs(tensor, start, size) for start, size in zip(starts, sizes, strict=False)]


def take_outputs(tensor: QuantizedTensor, start: ArrayLike, size: int) -> QuantizedTensor:
    """The weight of `size` outputs from `start` on."""
    by_output = replace(tensor, group_of_row=None)
    cut = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=-1), by_output)
    return replace(cut, group_of_row=tensor.group_of_row)


def check_layout(tensor: QuantizedTensor, name: str = "tensor") -> None:
    """Raise ValueError naming `name` and the first array whose shape or dtype breaks an invariant of `QuantizedTensor`.

    Arrays may be abstract, as `jax.eval_shape` gives them.
    """
    spec, d_in, d_out = tensor.spec, tensor.d_in, tensor.d_out
    expected: dict[str, tuple[int, ...]] = {
        "codes": (packed_words(d_in, spec.bits), d_out),
        "scales": (spec.groups(d_in), d_out),
    }
    if not spec.symmetric:
        expected["zeros"] = (spec.groups(d_in), d_out)
    if tensor.group_of_row is not None:
        expected["group_of_row"] = (d_in,)
    stack = tensor.codes.shape[:-2][:1]
    for array, shape in expected.items():
        found, shape = getattr(tensor, array), (*stack, *shape)
        if found is None or found.shape != shape:
            found_shape = None if found is None else found.shape
            raise ValueError(f"{name}: {array} has shape {found_shape}, but {spec} with d_in={d_in} needs {shape}.")
    if spec.symmetric and tensor.zeros is not None:
        raise ValueError(f"{name}: zeros are stored, but the grid is symmetric.")
    if tensor.codes.dtype != jnp.uint32:
        raise ValueError(f"{name}: codes are {tensor.codes.dtype}, not uint32.")
    if not _is_floating(tensor.scales):
        raise ValueError(f"{name}: scales are {tensor.scales.dtype}, not floating.")
    if tensor.zeros is not None and not (_is_floating(tensor.zeros) or tensor.zeros.dtype == jnp.uint8):
        raise ValueError(f"{name}: zeros are {tensor.zeros.dtype}, neither uint8 nor floating.")
    if tensor.group_of_row is not None and tensor.group_of_row.dtype != jnp.int32:
        raise ValueError(f"{name}: group_of_row is {tensor.group_of_row.dtype}, not int32.")


def _is_floating(array: Shaped[Array, "..."] | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def validate(tensor: QuantizedTensor, name: str = "tensor") -> None:
    """Raise ValueError naming `name` and the first array that breaks an invariant of `QuantizedTensor`.

    Not called when the dataclass is made: JAX rebuilds pytrees with placeholders in place of arrays.
    """
    check_layout(tensor, name)
    if not bool(all_finite(tensor.scales)):
        raise ValueError(f"{name}: scales hold NaN or infinity.")
    if tensor.zeros is not None and _is_floating(tensor.zeros) and not bool(all_finite(tensor.zeros)):
        raise ValueError(f"{name}: zeros hold NaN or infinity.")
    if tensor.group_of_row is not None:
        low, high, groups = int(tensor.group_of_row.min()), int(tensor.group_of_row.max()), tensor.scales.shape[-2]
        if low < 0 or high >= groups:
            raise ValueError(f"{name}: group_of_row spans {low}..{high}, but there are {groups} groups.")
