"""Statistics that devices add up together, in the order of the batches, however many devices there are.

Floating-point sums depend on their order. Here each batch's share is computed by one device, as one device alone would,
and the shares are added one after another: devices 1, 2, 4 and 8 give the same bits. Every device adds up a part of
each array, of which the others send it theirs (`all_to_all`): as much traffic as a reduce-scatter.
"""

from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from gptq_jax.parallel.data import AXIS

Tree = Any


def zeros(shapes: Tree, mesh: Mesh) -> Tree:
    """Nothing added yet: for each array, its values in a row, cut over the devices.

    Args:
        shapes: a pytree of `jax.ShapeDtypeStruct`.
        mesh: of `make_mesh`.
    """
    cut = NamedSharding(mesh, PartitionSpec(AXIS))

    def one(shape: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(_padded(shape.shape, mesh.size), shape.dtype, device=cut)

    return jax.tree.map(one, shapes)


def add(sums: Tree, shares: Tree, mesh: Mesh) -> Tree:
    """The sums with one share of each device added, in the order of the devices.

    Args:
        sums: of `zeros` or `add`; donated.
        shares: of the same structure, each array with a leading axis of devices, cut along it.
        mesh: of `make_mesh`.
    """
    return _add(mesh)(sums, shares)


def whole(sums: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """The sums in their shapes, on every device."""
    leaves, structure = jax.tree.flatten(shapes)
    arrays = _whole(mesh, tuple(leaf.shape for leaf in leaves))(jax.tree.leaves(sums))
    return jax.tree.unflatten(structure, arrays)


@lru_cache
def _add(mesh: Mesh) -> Any:
    def one(total: Shaped[Array, "part"], share: Shaped[Array, "1 ..."]) -> Shaped[Array, "part"]:
        flat = jnp.pad(share.reshape(-1), (0, mesh.size * total.size - share.size))
        parts = jax.lax.all_to_all(flat.reshape(mesh.size, -1), AXIS, split_axis=0, concat_axis=0)
        for part in parts:  # in order; as many as there are devices
            total = total + part
        return total

    def tree(sums: Tree, shares: Tree) -> Tree:
        return jax.tree.map(one, sums, shares)

    rows = PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(tree, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False), donate_argnums=0
    )


@lru_cache(maxsize=64)
def _whole(mesh: Mesh, shapes: tuple[tuple[int, ...], ...]) -> Any:
    def reshape(sums: list[Array]) -> list[Array]:
        return [total[: prod(shape)].reshape(shape) for total, shape in zip(sums, shapes, strict=True)]

    return jax.jit(reshape, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _padded(shape: tuple[int, ...], devices: int) -> int:
    return -(-prod(shape) // devices) * devices
