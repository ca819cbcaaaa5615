"""A user's own module in a store: its parameters by their own names, and how packed ones are matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptq_jax.hooks.layout import Layout
from gptq_jax.models.adapted import AdaptedModel, adapt, name_of
from gptq_jax.storage.base import CheckpointError

ADAPTED = "gptq_jax_module"  # the entry of config.json that describes the module's tree


@dataclass(frozen=True)
class AdaptedTree:
    """What a store holds of a module: stands where the architecture stands for a supplied model.

    Attributes:
        leaves: shapes by path, first "params" or "state"; matrices of packed parameters.
        layouts: of packed parameters by path.
    """

    leaves: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Layout]

    def abstract_params(self) -> Any:
        """The tree, as `jax.ShapeDtypeStruct`s."""
        return _nested((path, jax.ShapeDtypeStruct(shape, jnp.float32)) for path, shape in self.leaves.items())

    @property
    def packable(self) -> set[str]:
        """Leaves that are packed."""
        return {f"params.{path}" for path in self.layouts}

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        layouts = {path: layout.to_json() for path, layout in self.layouts.items()}
        return {"leaves": {path: list(shape) for path, shape in self.leaves.items()}, "layouts": layouts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AdaptedTree":
        """The inverse of `to_json`; ValueError, KeyError or TypeError for anything else."""
        layouts = {path: Layout.from_json(layout) for path, layout in data["layouts"].items()}
        leaves = {path: tuple(map(int, shape)) for path, shape in data["leaves"].items()}
        for path, layout in layouts.items():
            if leaves[f"params.{path}"] != layout.matrix_shape:
                raise ValueError(f"{path} is stored as {leaves[f'params.{path}']}, but packed as {layout.matrix_shape}")
        return cls(leaves, layouts)


def stored_form(model: AdaptedModel) -> tuple[Any, dict[str, Any]]:
    """The tree of arrays to be stored, and the content of config.json."""
    params = model.by_path()
    state = {name_of(where): leaf for where, leaf in _plain_state(model.state)}
    tree = AdaptedTree(
        {
            **{f"params.{path}": tuple(leaf.shape) for path, leaf in params.items()},
            **{f"state.{path}": tuple(leaf.shape) for path, leaf in state.items()},
        },
        model.layouts,
    )
    leaves = [
        *((f"params.{p}", leaf) for p, leaf in params.items()),
        *((f"state.{p}", leaf) for p, leaf in state.items()),
    ]
    return _nested(leaves), {ADAPTED: tree.to_json()}


def adapted_again(
    tree: AdaptedTree, module: Any, stored: Mapping[str, Any], tokenizer: Any, report: Any, path: Path
) -> AdaptedModel:
    """The model that was saved.

    Args:
        tree: that was stored.
        module: the user's, its own parameters unused.
        stored: the arrays.
        tokenizer, report: of the model.
        path: for errors.

    Raises:
        CheckpointError: the module's parameters are others.
    """
    params = stored.get("params", {})
    if isinstance(module, nn.Module):
        model = adapt(module, {"params": params, **stored.get("state", {})})
        return AdaptedModel(model.function, params, model.state, dict(tree.layouts), None, tokenizer, report)
    own = adapt(module)
    shapes = {
        name: layout.shape if (layout := tree.layouts.get(name)) else tree.leaves[f"params.{name}"]
        for name in (leaf.removeprefix("params.") for leaf in tree.leaves if leaf.startswith("params."))
    }
    found = {name: tuple(leaf.shape) for name, leaf in own.by_path().items()}
    if wrong := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        name = wrong[0]
        raise CheckpointError(
            path, f"does not fit {own.function.name}: {name} is {shapes.get(name)} here, but {found.get(name)} there."
        )
    values = dict(_flat(stored.get("state", {})))

    state = jax.tree_util.tree_map_with_path(lambda at, leaf: values.get(name_of(at), _made(leaf)), own.state)
    return AdaptedModel(own.function, params, state, dict(tree.layouts), None, tokenizer, report)


def _made(leaf: Any) -> Any:
    """A variable that is not stored, of a module of shapes: random keys and counters, which no call reads."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _plain_state(state: Any) -> list[tuple[Any, Any]]:
    """The variables beside the parameters that are float: no random keys, no counters."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(where, leaf) for where, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split(".")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        here[name] = leaf
    return tree


def _flat(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    for name, child in tree.items() if isinstance(tree, dict) else ():
        yield from _flat(child, f"{path}{name}.") if isinstance(child, dict) else [(path + name, child)]
