"""Layers solved by many devices: each takes some of the outputs, which GPTQ rounds independently of one another."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gptq_jax.parallel.data import AXIS
from gptq_jax.tensor import QuantizedTensor


def by_outputs(
    function: Callable[..., Any], *static: Hashable, mesh: Mesh | None, cut: tuple[Any, ...], whole: tuple[Any, ...]
) -> Any:
    """`function(*static, *cut, *whole)`, computed for some of the outputs on each device; the result is on all.

    Outputs are filled up with copies of the last until the devices divide them.

    Args:
        function: known by its identity. Of what it returns, QuantizedTensors and what is in `Outputs` have the outputs
            as their last axis; the rest is the same for all outputs.
        static: hashable arguments.
        mesh: of `make_mesh`; None: the function is called as it is.
        cut: weights [..., d_out], float or QuantizedTensors, on every device.
        whole: pytrees on every device.
    """
    if mesh is None:
        return function(*static, *cut, *whole)
    return _mapped(function, static, mesh)(cut, whole)


class Outputs(tuple[Any, ...]):
    """Arrays, each with the outputs as its last axis."""


jax.tree_util.register_pytree_node(Outputs, lambda node: (tuple(node), None), lambda _, leaves: Outputs(leaves))


@lru_cache(maxsize=256)
def _mapped(function: Callable[..., Any], static: tuple[Hashable, ...], mesh: Mesh) -> Any:
    def call(cut: tuple[Any, ...], whole: tuple[Any, ...]) -> Any:
        return function(*static, *cut, *whole)

    def run(cut: tuple[Any, ...], whole: tuple[Any, ...]) -> Any:
        d_out = cut[0].shape[-1]
        given = _specs(Outputs(cut))
        filled = tuple(jax.tree.map(lambda array, spec: _fill(array, spec, mesh.size), Outputs(cut), given))
        specs = _specs(jax.eval_shape(call, filled, whole))
        mapped = jax.shard_map(
            call,
            mesh=mesh,
            in_specs=(tuple(given), PartitionSpec()),
            out_specs=specs,
            check_vma=False,  # what is the same for all outputs is computed by each device
        )
        return jax.tree.map(
            lambda array, spec: array[..., :d_out] if AXIS in spec else array, mapped(filled, whole), specs
        )

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _specs(tree: Any) -> Any:
    return jax.tree.map(_spec, tree, is_leaf=lambda node: isinstance(node, QuantizedTensor | Outputs))


def _spec(node: Any) -> Any:
    """The specs of the arrays of a node."""
    if isinstance(node, QuantizedTensor):
        cut = jax.tree.map(_last, node)
        return replace(cut, group_of_row=None if node.group_of_row is None else PartitionSpec())
    if isinstance(node, Outputs):
        return Outputs(_spec(each) if isinstance(each, QuantizedTensor) else _last(each) for each in node)
    return PartitionSpec()


def _last(array: Any) -> PartitionSpec:
    return PartitionSpec(*[None] * (array.ndim - 1), AXIS)


def _fill(array: Array, spec: PartitionSpec, devices: int) -> Array:
    if AXIS not in spec:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % devices)], mode="edge")
