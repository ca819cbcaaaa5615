"""Which weights of a decoder are cut by outputs and which by inputs: Megatron-LM's way (arXiv:1909.08053, section 3).

Layers that make queries, keys, values or the inner width of an MLP are cut by outputs, so that each device has its own
heads and its own part of the inner width; the layers after them by inputs, so that it needs no others'. A device
then has a share of each sum, and the only traffic in a block is that of adding these up.
"""

import re
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Rules = tuple[tuple[str, PartitionSpec], ...]

# Roles in a block, fields of `Names`. Where one layer has q, k and v, or gate and up, side by side, each device has
# some of all outputs in their order, and XLA sends the products where they are needed.
BY_OUTPUTS = ("query", "key", "value", "qkv", "gate", "up", "gate_up", "expert_gate", "expert_up")
BY_INPUTS = ("output", "down", "expert_down")


def tensor_parallel_rules(config: Any, axis: str = "model") -> Rules:
    """Pairs of a regex, to be found in the name of a parameter, and where the parameter goes.

    Experts are all on every device, each cut like an MLP, so that work is even whatever the router does. The embedding
    and an output head are cut by the vocabulary; norms, biases, routers and positions are everywhere.

    Args:
        config: of a supplied architecture.
        axis: of the mesh.
    """
    rules = []
    for role in (*BY_OUTPUTS, *BY_INPUTS):
        kernel = (axis, None) if role in BY_INPUTS else (None, axis)
        stack = (None,) if role.startswith("expert_") else ()
        name = re.escape(getattr(config.names, role))
        rules.append((rf"^layers\.\d+\.{name}\.kernel$", PartitionSpec(*stack, *kernel)))
    return (
        *rules,
        (r"^embed\.embedding$", PartitionSpec(axis, None)),
        (r"^head\.lm_head\.kernel$", PartitionSpec(None, axis)),
    )


def heads_of(block_params: Any) -> NamedSharding | None:
    """Where arrays [batch, heads, ...] of a block go: cut as its first parameter that is; None where none is."""
    for leaf in jax.tree.leaves(block_params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            axes = next(entry for entry in sharding.spec if entry)
            return NamedSharding(sharding.mesh, PartitionSpec(None, axes))
    return None


def where_even(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding` for an array of this shape, or every device where it does not divide the shape."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
