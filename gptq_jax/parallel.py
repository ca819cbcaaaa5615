"""Many devices of one process: a mesh with one axis, batches cut along it, parameters on every device."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

AXIS = "batch"
PARALLEL = ("jit", "pmap")

Tree = TypeVar("Tree")


def choose_devices(devices: int | Sequence[jax.Device] | None) -> tuple[jax.Device, ...]:
    """The devices themselves, the first so many of this process, or all of them for None.

    Raises:
        ValueError: not a positive number, more than there are, or the same one twice.
    """
    here = jax.local_devices()
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
        return tuple(here[:devices])
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

    def replicate(self, tree: Tree) -> Tree:
        """`tree` on every device; copied only to those where it is not yet."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, batch: Shaped[np.ndarray, "rows ..."]) -> Shaped[Array, "..."]:
        """Rows cut evenly over the devices, of whose number they are a multiple."""
        if self.mesh is None:
            return jax.numpy.asarray(batch)
        if self.parallel == "pmap":
            batch = batch.reshape(self.size, -1, *batch.shape[1:])
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def gather(self, rows: Shaped[Array, "..."]) -> Shaped[np.ndarray, "rows ..."]:
        """The inverse of `shard`."""
        found = np.asarray(rows)
        return found.reshape(-1, *found.shape[2:]) if self.mesh is not None and self.parallel == "pmap" else found

    def run(self, function: Callable[..., Any], *static: Hashable, params: Any, batches: tuple[Array, ...]) -> Any:
        """`function(*static, params, *batches)`, whose result has the rows of the batches.

        Args:
            function: known by its identity: it is compiled once for each mesh and `static`.
            static: what it is specialized for.
            params: of `replicate`.
            batches: of `shard`, or of `run`.
        """
        if self.mesh is None:
            return function(*static, params, *batches)
        return _mapped(function, static, self.mesh, self.parallel)(params, batches)


@lru_cache(maxsize=64)
def _mapped(function: Callable[..., Any], static: tuple[Hashable, ...], mesh: Mesh, parallel: str) -> Any:
    def one_device(params: Any, batches: tuple[Array, ...]) -> Any:
        return function(*static, params, *batches)

    if parallel == "pmap":
        return jax.pmap(one_device, AXIS, in_axes=(None, 0), devices=list(mesh.devices.flat))
    # check_vma is about collectives, of which there are none; kernels need not say how their results vary.
    rows = PartitionSpec(AXIS)
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return jax.jit(mapped)
