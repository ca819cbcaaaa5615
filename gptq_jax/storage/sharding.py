"""On which devices the arrays of a model go, decided by name before anything is read."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

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
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from None

    def __call__(self, name: str, shape: tuple[int, ...]) -> Sharding:
        """The sharding of one array; ValueError if its shape cannot be cut so."""
        spec = next((spec for pattern, spec in self.rules if re.search(pattern, name)), PartitionSpec())
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
