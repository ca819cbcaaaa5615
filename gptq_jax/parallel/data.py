"""Many devices, of one process or several: a mesh with one axis, batches cut along it, parameters on every device."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Shaped

AXIS = "batch"
PARALLEL = ("jit", "pmap")

Tree = TypeVar("Tree")


def choose_devices(devices: int | Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices themselves, the first so many, or all of them for None; of several processes, all have to take part.

    Raises:
        ValueError: not a positive number, more than there are, or the same one twice.
    """
    here = jax.devices()
    if devices is None:
        return tuple(here)
    if isinstance(devices, int):
        if isinstance(devices, bool) or devices < 1:
            raise ValueError(f"devices={devices} must be positive: use 1 to {len(here)}.")
        if devices > len(here):
            hint = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
            raise ValueError(
                f"devices={devices} is more than the {len(here)} {here[0].platform} device"
                f"{'s' if len(here) > 1 else ''} of this process: use at most {len(here)}"
                f"{hint if here[0].platform == 'cpu' else ''}."
            )
        chosen = here[:devices]
        if left_out := {device.process_index for device in here} - {device.process_index for device in chosen}:
            raise ValueError(f"devices={devices} leaves out process {min(left_out)}: every process needs one at least.")
        return tuple(chosen)
    if not devices or len(set(devices)) != len(devices):
        raise ValueError(f"devices={list(devices)} must be at least one device, and none twice.")
    return tuple(devices)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Devices in a row, along the axis `AXIS`."""
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def is_cut(tree: Any) -> bool:
    """Whether an array of `tree` is spread over devices, no one of which holds all of it."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class DataParallel:
    """Functions of parameters and batches, run on a mesh: each device takes its rows of the batches.

    Attributes:
        mesh: of `make_mesh`. None: nothing is moved, and functions run wherever the parameters are.
        parallel: "jit": one program for the mesh, each device's part as `jax.shard_map` hands it out, since the
            compiler would gather a batch to loop over its rows, and cannot cut a custom kernel. "pmap": the same
            by `jax.pmap`, with a leading axis of devices on every batch.
    """

    mesh: Mesh | None
    parallel: str = "jit"

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel={self.parallel!r} is not supported: use {' or '.join(PARALLEL)}.")

    @property
    def size(self) -> int:
        """Devices that a batch is cut for."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def here(self) -> tuple[int, ...]:
        """Which parts of a batch are on devices of this process, by number."""
        if self.mesh is None:
            return (0,)
        devices = enumerate(self.mesh.devices.flat)
        return tuple(number for number, device in devices if device.process_index == jax.process_index())

    def replicate(self, tree: Tree) -> Tree:
        """`tree` on every device; copied only to those where it is not yet."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if len(self.here) == self.size:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: place(leaf, sharding), tree)

    def on_one(self, tree: Tree) -> Tree:
        """What `replicate` put on every device, on the first alone; in one process."""
        return tree if self.mesh is None else jax.device_put(tree, self.mesh.devices.flat[0])

    def shard(self, batch: Shaped[np.ndarray, "rows ..."]) -> Shaped[Array, "..."]:
        """Rows cut evenly over the devices, of whose number they are a multiple; each process gives all of them."""
        if self.mesh is None:
            return jax.numpy.asarray(batch)
        if self.parallel == "pmap":
            batch = batch.reshape(self.size, -1, *batch.shape[1:])
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        if len(self.here) == self.size:
            return jax.device_put(batch, sharding)
        if self.parallel == "pmap":  # takes what the devices of this process need
            return jax.numpy.asarray(batch[list(self.here)])
        return place(batch, sharding)

    def gather(self, rows: Shaped[Array, "..."]) -> Shaped[np.ndarray, "rows ..."]:
        """The inverse of `shard`."""
        if self.mesh is None or len(self.here) == self.size:
            found = np.asarray(rows)
        else:
            from jax.experimental.multihost_utils import process_allgather

            found = process_allgather(rows, tiled=True)
        return found.reshape(-1, *found.shape[2:]) if self.mesh is not None and self.parallel == "pmap" else found

    def feed(self, parts: Tree) -> Tree:
        """Arrays of the host, the rows that this process's devices take, as `run` takes them."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, parts)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), parts)

    def fetch(self, tree: Tree) -> Tree:
        """The inverse of `feed`."""
        return jax.tree.map(on_host if self.mesh is None else _local_rows, tree)

    def run(self, function: Callable[..., Any], *static: Hashable, params: Any, batches: tuple[Any, ...]) -> Any:
        """`function(*static, params, *batches)`, whose result has the rows of the batches.

        Args:
            function: known by its identity: it is compiled once for each mesh and `static`.
            static: what it is specialized for.
            params: of `replicate`.
            batches: pytrees of `shard`, `feed` or `run`.
        """
        if self.mesh is None:
            return function(*static, params, *batches)
        return _mapped(function, static, self.mesh, self.parallel)(params, batches)


def on_host(leaf: Any) -> Any:
    """An array of the host's; keys of random numbers, which numpy has not, stay as they are."""
    return leaf if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def place(leaf: Any, sharding: Sharding) -> Array:
    """An array that every process has, on devices that may be of other processes; each is sent its part only."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda array: array, out_shardings=sharding)(leaf)
    found = np.asarray(leaf)
    return jax.make_array_from_callback(found.shape, sharding, lambda where: found[where])


def _local_rows(array: Array) -> Shaped[np.ndarray, "rows ..."]:
    """Of an array that is cut by rows, those on devices of this process."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@lru_cache(maxsize=256)
def _mapped(function: Callable[..., Any], static: tuple[Hashable, ...], mesh: Mesh, parallel: str) -> Any:
    def one_device(params: Any, batches: tuple[Array, ...]) -> Any:
        return function(*static, params, *batches)

    if parallel == "pmap":
        return jax.pmap(one_device, AXIS, in_axes=(None, 0), devices=list(mesh.devices.flat))
    # check_vma is about collectives, of which there are none; kernels need not say how their results vary.
    rows = PartitionSpec(AXIS)
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return jax.jit(mapped)
