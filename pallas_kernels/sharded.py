"""Products with a weight that is cut over the devices of a mesh: each multiplies its part, by the kernel it has.

A compiler can cut XLA's own operations but no custom kernel, so `jax.shard_map` hands every device its part, a whole
weight to the kernel. Cut by outputs, each device has some of the results; cut by inputs, a share of each of them, and
they are added up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer, Shaped

from pallas_kernels import api
from pallas_kernels.packing import shortest_run
from pallas_kernels.weight import PackedWeight, Problem, concatenate

ARRAYS = ("codes", "scales", "zeros", "group_of_row")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a weight lies on a mesh; hashable, so static under jit.

    Attributes:
        mesh: the devices.
        by: "outputs", "inputs" or "experts": what each device has a part of; None: every device has the whole.
        axes: of the mesh, over which it is cut; none where `by` is None. Other axes share the rows of `x`.
    """

    mesh: Mesh
    by: str | None = None
    axes: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Into how many the weight is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def first_axis(self) -> PartitionSpec:
        """The devices' own arrays, end to end."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
@no_type_check  # JAX rebuilds pytrees with shapes and placeholders in place of arrays
class ShardedWeight:
    """A weight prepared on every device of a mesh.

    Attributes:
        part: what each device has prepared of its part; the arrays are those of all devices, end to end along their
            first axes, so that each device holds its own.
        cut: how the weight was cut. Static.
    """

    part: api.PreparedWeight
    cut: Cut = field(metadata={"static": True})

    @property
    def d_in(self) -> int:
        """Inputs of the whole weight."""
        return self.part.d_in * (self.cut.parts if self.cut.by == "inputs" else 1)

    @property
    def d_out(self) -> int:
        """Outputs of the whole weight."""
        return self.part.d_out * (self.cut.parts if self.cut.by == "outputs" else 1)

    @property
    def problem(self) -> Problem:
        """What a device's part was prepared for."""
        return self.part.problem


def refusal(weight: PackedWeight, by: str | None, parts: int) -> str | None:
    """Why a weight, of arrays or of shapes, cannot be cut so; None where it can.

    By inputs only between groups, between packed words, and where the inputs of a group are neighbours.
    """
    if by is None or parts == 1:
        return None
    sizes = {"experts": weight.codes.shape[0], "outputs": weight.d_out, "inputs": weight.d_in}
    if sizes[by] % parts:
        return f"{sizes[by]} {by} cannot be cut into {parts} equal parts"
    if by != "inputs":
        return None
    if weight.group_of_row is not None:
        return "its inputs are in another order than their groups (activation order)"
    rows, (run, _) = weight.d_in // parts, shortest_run(weight.bits)
    if weight.groups > 1 and rows % weight.group_rows:
        return f"parts of {rows} inputs would cut groups of {weight.group_rows}"
    if rows % run:
        return f"parts of {rows} inputs would cut packed words ({run} inputs at {weight.bits} bits)"
    return None


def array_specs(weight: PackedWeight, by: str | None, axes: tuple[str, ...]) -> dict[str, PartitionSpec]:
    """Where each array of a weight goes, by its name in `ARRAYS`; the weight may be of shapes."""
    stack = [None] * (weight.codes.ndim - 2)
    whole, outputs = PartitionSpec(), PartitionSpec(*stack, None, axes)
    rows = PartitionSpec(*stack, axes, None)
    specs = {
        None: (whole, whole, whole),
        "experts": (PartitionSpec(axes),) * 3,
        "outputs": (outputs, outputs, whole),
        "inputs": (rows, rows if weight.groups > 1 else whole, whole),
    }
    codes, scales, order = specs[by]
    return {"codes": codes, "scales": scales, "zeros": scales, "group_of_row": order}


def prepare(
    weights: Sequence[PackedWeight], cut: Cut, implementation: str | None = None, x_dtype: Any = jnp.float32
) -> ShardedWeight:
    """Prepare, on each device of this process, its part of weights that are fed the same array.

    Args:
        weights: of one grid, cut in the same way, each array on the devices of the mesh. Of several, a device has
            its parts side by side; see `quantized_matmul`.
        cut: how they are cut.
        implementation: as for `pallas_kernels.api.prepare`.
        x_dtype: the dtype of the activations to come.

    Raises:
        ValueError: a weight cannot be cut so, or as for `pallas_kernels.api.prepare`.
        NotImplementedError: as there.
    """
    for weight in weights:
        if (reason := refusal(weight, cut.by, cut.parts)) is not None:
            raise ValueError(f"the weight cannot be cut by {cut.by} over the mesh axes {cut.axes}: {reason}.")
    own = [_parts(weight, cut) for weight in weights]
    prepared = [
        api.prepare(concatenate(parts) if len(parts) > 1 else parts[0], implementation, x_dtype)
        for parts in zip(*own, strict=True)
    ]
    sharding = NamedSharding(cut.mesh, cut.first_axis)

    def end_to_end(*leaves: Array) -> Array:
        shape = (cut.parts * leaves[0].shape[0], *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, leaves)

    arrays = jax.tree.map(end_to_end, *(part.arrays for part in prepared))
    return ShardedWeight(part=replace(prepared[0], arrays=arrays), cut=cut)


def _parts(weight: PackedWeight, cut: Cut) -> list[PackedWeight]:
    """What each device of this process has of a weight, a weight of its own."""
    devices = [device for device in cut.mesh.devices.flat if device.process_index == jax.process_index()]
    rows = weight.d_in // (cut.parts if cut.by == "inputs" else 1)
    found: list[dict[str, Array]] = [{} for _ in devices]
    for name, spec in array_specs(weight, cut.by, cut.axes).items():
        if (array := getattr(weight, name)) is not None:
            array = jax.device_put(array, NamedSharding(cut.mesh, spec))
            of_device = {shard.device: shard.data for shard in array.addressable_shards}
            for device, arrays in zip(devices, found, strict=True):
                arrays[name] = of_device[device]
    return [
        PackedWeight(**arrays, bits=weight.bits, group_rows=min(weight.group_rows, rows), d_in=rows) for arrays in found
    ]


def quantized_matmul(
    x: Shaped[Array, "*batch d_in"],
    weight: ShardedWeight,
    implementation: str | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Float[Array, "*batch _"]]:
    """`x @ weight` as `pallas_kernels.api.quantized_matmul`; differentiable in `x`.

    The sums of a weight that is cut by inputs are added up in float32. Where the mesh has other axes and they divide
    the first axis of `x`, it is cut over them.

    Args:
        x: float32, bfloat16 or float16.
        weight: of `prepare`.
        implementation: as there.
        sizes: outputs of each weight that was prepared, in their order; None where it was one.

    Returns:
        The product with each of them.
    """
    api.check_x(x, weight)
    cut = weight.cut
    others = tuple(axis for axis in cut.mesh.axis_names if axis not in cut.axes)
    shared = math.prod(cut.mesh.shape[axis] for axis in others)
    batch: list[Any] = [None] * (x.ndim - 1)
    if batch and shared > 1 and x.shape[0] % shared == 0:
        batch[0] = others

    def product(x: Array, part: api.PreparedWeight) -> Array:
        return api.quantized_matmul(x, part, implementation)

    return _mapped(product, x, weight, batch, sizes)


def grouped_matmul(
    x: Shaped[Array, "tokens d_in"],
    weight: ShardedWeight,
    group_sizes: Integer[Array, "experts"],
    implementation: str | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Float[Array, "tokens _"]]:
    """Each row of `x` times the weight of its expert, as `pallas_kernels.api.grouped_matmul`.

    Args:
        x: sorted by expert.
        weight: a stack of experts.
        group_sizes: rows of each expert.
        implementation: as for `quantized_matmul`.
        sizes: as there.

    Returns:
        As there.
    """
    api.check_x(x, weight)

    def product(x: Array, part: api.PreparedWeight, group_sizes: Array) -> Array:
        if weight.cut.by != "experts":
            return api.grouped_matmul(x, part, group_sizes, implementation)
        # The rows of this device's experts, moved to the front; the results of all others are zero.
        experts = group_sizes.shape[0] // weight.cut.parts
        first = jax.lax.axis_index(weight.cut.axes) * experts
        start = jnp.sum(jnp.where(jnp.arange(group_sizes.shape[0]) < first, group_sizes, 0))
        own = jax.lax.dynamic_slice_in_dim(group_sizes, first, experts)
        return jnp.roll(api.grouped_matmul(jnp.roll(x, -start, axis=0), part, own, implementation), start, axis=0)

    return _mapped(product, x, weight, [None], sizes, group_sizes)


def _mapped(
    product: Any, x: Array, weight: ShardedWeight, batch: list[Any], sizes: Sequence[int] | None, *everywhere: Array
) -> list[Array]:
    """`product(x, part, *everywhere)` on every device, its outputs apart by `sizes`."""
    cut = weight.cut
    sizes = [weight.d_out] if sizes is None else sizes
    local = [size // (cut.parts if cut.by == "outputs" else 1) for size in sizes]

    def on_device(x: Array, part: api.PreparedWeight, *everywhere: Array) -> list[Array]:
        y = product(x, part, *everywhere)
        if cut.by in ("inputs", "experts"):
            y = jax.lax.psum(y.astype(jnp.float32), cut.axes).astype(y.dtype)
        return jnp.split(y, list(accumulate(local))[:-1], axis=-1)

    mapped = jax.shard_map(
        on_device,
        mesh=cut.mesh,
        in_specs=(
            PartitionSpec(*batch, cut.axes if cut.by == "inputs" else None),
            cut.first_axis,
            *(PartitionSpec() for _ in everywhere),
        ),
        out_specs=PartitionSpec(*batch, cut.axes if cut.by == "outputs" else None),
        check_vma=False,  # kernels need not say how their results vary
    )
    return mapped(x, weight.part, *everywhere)
