"""On which devices the arrays of a model go, decided by name before anything is read."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from gptq_jax.matmul import packed_weight
from gptq_jax.models.tensor_parallel import Rules, tensor_parallel_rules
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.sharded import array_specs, refusal

MODEL_AXIS = "model"  # over which a mesh of several axes cuts weights, where no rules say otherwise

# An array's name, like "layers.3.mlp.down_proj.kernel.codes", and its shape -> where it goes.
Placement = Callable[[str, tuple[int, ...]], Sharding]


@dataclass(frozen=True)
class ShardingRules:
    """A `Placement`: an array takes the spec of the first regex found in its name; others are on every device.

    A packed kernel is several arrays: `.codes`, `.scales`, `.zeros` and `.group_of_row` follow its name. All but
    the last have the outputs as their second axis, so that one rule cuts a layer by outputs:

        ShardingRules(mesh, ((r"(q|k|v|gate|up)_proj\\.kernel", PartitionSpec(None, "model")),))

    Attributes:
        mesh: the devices.
        rules: pairs of a regex and a spec, in order. A spec's axes beyond an array's rank are left out.
    """

    mesh: Mesh
    rules: tuple[tuple[str, PartitionSpec], ...] = ()

    def __post_init__(self) -> None:
        _check_rules(self.mesh, self.rules)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Sharding:
        """The sharding of one array; ValueError if its shape cannot be cut so."""
        spec = _find(self.rules, name)
        spec = PartitionSpec(*spec[: len(shape)])
        sharding = NamedSharding(self.mesh, spec)
        try:
            sharding.shard_shape(shape)
        except ValueError:
            raise ValueError(
                f"{name} of shape {shape} cannot be cut by {spec} on the mesh {dict(self.mesh.shape)}: "
                "give it another rule before this one."
            ) from None
        return sharding


class PlacementWarning(UserWarning):
    """Parameters lie otherwise on a mesh than the rules for all models would have them."""


@dataclass(frozen=True)
class MeshPlacement:
    """A `Placement`: every array of a model by its full name, so that the arrays of a packed kernel fit together.

    Attributes:
        mesh: the devices.
        specs: of every array.
        notes: which parameters do not lie as the rules say, and why, each a phrase.
    """

    mesh: Mesh
    specs: Mapping[str, PartitionSpec]
    notes: tuple[str, ...] = ()

    def __call__(self, name: str, shape: tuple[int, ...]) -> Sharding:
        """The sharding of one array."""
        return NamedSharding(self.mesh, self.specs[name])


def model_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Devices in a row, along the axis over which weights are cut."""
    return jax.make_mesh((len(devices),), (MODEL_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def place_on_mesh(config: Any, params: Any, mesh: Mesh, rules: Rules | None = None) -> MeshPlacement:
    """Where every array of a model goes on a mesh, the packed ones cut between groups and between words.

    Args:
        config: the architecture; None for a module of one's own, which needs rules.
        params: its parameters as shapes, QuantizedTensors of shapes where kernels are packed.
        mesh: the devices. Its axes become automatic (`AxisType.Auto`).
        rules: pairs of a regex and the spec of a parameter, a packed kernel's that of its [d_in, d_out] weight: the
            first whose regex is found in the name counts, and what none names is on every device. None:
            `tensor_parallel_rules` over the mesh's only axis, or the one called "model"; what cannot be cut so is cut
            the other way, or is on every device, and `notes` says so.

    Raises:
        ValueError: rules name an axis that the mesh lacks or do not fit a parameter, or there is no axis to choose.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    own = rules is not None
    if rules is None:
        if config is None:
            raise ValueError("rules=None is for supplied architectures: say how your own module is cut.")
        rules = tensor_parallel_rules(config, _model_axis(mesh))
    _check_rules(mesh, rules)
    specs: dict[str, PartitionSpec] = {}
    notes: Counter[str] = Counter()
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        wanted = PartitionSpec(*_find(rules, name)[: len(leaf.shape)])
        reasons = []
        for spec in (wanted,) if own else (wanted, _other_way(wanted, len(leaf.shape)), PartitionSpec()):
            found = _array_specs(name, leaf, mesh, spec)
            if not isinstance(found, str):
                specs |= found
                break
            reasons.append(found)
        else:
            raise ValueError(
                f"{name} of shape {tuple(leaf.shape)} cannot be cut by {wanted} on the mesh {dict(mesh.shape)}: "
                f"{reasons[0]}. Give it another rule before this one."
            )
        if reasons:
            shown = re.sub(r"^layers\.\d+\.", "layers.*.", name)
            notes[f"{shown} is {'on every device' if not any(spec) else f'cut by {spec}'}, as {reasons[0]}"] += 1
    return MeshPlacement(mesh, specs, tuple(f"{note} ({count} of them)" for note, count in notes.items()))


def _array_specs(name: str, leaf: Any, mesh: Mesh, spec: PartitionSpec) -> dict[str, PartitionSpec] | str:
    """Where each array of a parameter goes by its full name, or why it cannot be cut so."""
    cuts = {index - len(leaf.shape): _axes(entry) for index, entry in enumerate(spec) if entry}
    if not _is_packed(leaf):
        for index, axes in cuts.items():
            if leaf.shape[index] % (parts := _parts(mesh, axes)):
                return f"an axis of {leaf.shape[index]} cannot be cut into {parts} equal parts"
        return {name: spec}
    if len(cuts) > 1:
        return "a packed weight is cut along one of its axes"
    weight = packed_weight(leaf)
    by, axes = next(((_BY[index], axes) for index, axes in cuts.items()), (None, ()))
    if (reason := refusal(weight, by, _parts(mesh, axes))) is not None:
        return reason
    found = array_specs(weight, by, axes)
    return {f"{name}.{array}": spec for array, spec in found.items() if getattr(leaf, array) is not None}


_BY = {-1: "outputs", -2: "inputs", -3: "experts"}


def _other_way(spec: PartitionSpec, rank: int) -> PartitionSpec:
    """A matrix that is cut along the other axis."""
    *stack, first, second = (*spec, *[None] * (rank - len(spec))) if rank > 1 else (None, None)
    return PartitionSpec(*stack, second, first)


def _model_axis(mesh: Mesh) -> str:
    if len(mesh.axis_names) > 1 and MODEL_AXIS not in mesh.axis_names:
        raise ValueError(
            f"the mesh has the axes {list(mesh.axis_names)}: call the one that cuts weights {MODEL_AXIS!r}, or give "
            "rules."
        )
    return MODEL_AXIS if MODEL_AXIS in mesh.axis_names else mesh.axis_names[0]


def _check_rules(mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]) -> None:
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], PartitionSpec)):
            raise ValueError(f"rules must be pairs of a regex and a jax.sharding.PartitionSpec, but one is {rule!r}.")
        pattern, spec = rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from None
        named = {axis for entry in spec for axis in _axes(entry)}
        if unknown := sorted(named - set(mesh.axis_names)):
            raise ValueError(
                f"the rule {pattern!r} names the mesh axis {unknown[0]!r}, but the mesh has {list(mesh.axis_names)}."
            )


def _find(rules: Sequence[tuple[str, PartitionSpec]], name: str) -> PartitionSpec:
    return next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def one_device(name: str, shape: tuple[int, ...]) -> Sharding:
    """Everything on the first device of this process."""
    return SingleDeviceSharding(jax.local_devices()[0])


def as_placement(sharding: Sharding | Placement | None) -> Placement:
    """What `load` takes, as a function."""
    if sharding is None:
        return one_device
    if isinstance(sharding, Sharding):
        return lambda name, shape: sharding
    return sharding
