"""Orbax checkpoints of a parameter tree: this library's own names, or those of a Flax model of transformers 4.

The shapes come from Orbax's metadata; then every array is restored straight onto its devices.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gptq_jax.storage.base import FLOAT_DTYPES, CheckpointError
from gptq_jax.storage.flax_names import FlaxName, unwrapped
from gptq_jax.storage.flax_tree import named_as_torch
from gptq_jax.storage.hf_directory import read_config, read_tokenizer
from gptq_jax.storage.parameters import Leaf, put, read_float
from gptq_jax.storage.safetensors_header import first_line
from gptq_jax.storage.sharding import Placement

# Any of them marks a checkpoint of one tree: newer Orbax, OCDBT, and before there was metadata.
MARKS = ("_METADATA", "manifest.ocdbt", "checkpoint")
STEP = re.compile(r"(?:[A-Za-z]\w*_)?(\d+)")  # of a CheckpointManager, perhaps with a prefix
OWN = {"embed", "layers", "head"}  # what `Model.params` begins with
PACKED = "codes"


class OrbaxTree:
    """A `TensorSource` over an Orbax checkpoint and a config.json that says what model it is.

    Args:
        path: of the checkpoint, or of a CheckpointManager's directory, whose last step is taken.
        config_file: the config.json of the architecture.

    Raises:
        CheckpointError: there is no checkpoint of one tree, or it cannot be read, or holds packed weights.
    """

    format = "Orbax"

    def __init__(self, path: Path, config_file: Path) -> None:
        self.config_file = config_file
        self.config: dict[str, Any] = read_config(config_file)
        self.path = find_tree(path.absolute())
        self._tree = _metadata(self.path)
        leaves = jax.tree_util.tree_flatten_with_path(self._tree)[0]
        self._stored = {"/".join(_names(keys)): (keys, leaf) for keys, leaf in leaves}
        inside = unwrapped(self._stored)
        self.is_own = {parts[0] for parts in inside.values()} >= OWN
        if self.is_own:
            self._names = {".".join(parts): FlaxName(path, False) for path, parts in inside.items()}
        else:
            self._names = named_as_torch(self.path, self._stored, self.config)
        if any(name.endswith(f".kernel.{PACKED}") for name in self._names):
            raise CheckpointError(self.path, "holds packed weights: load the directory that gptq_jax.save wrote.")

    def names(self) -> list[str]:
        """Every parameter, by torch's name; of this library's own tree by its path there, with dots."""
        return list(self._names)

    def named(self, leaves: list[Leaf]) -> list[Leaf]:
        """The leaves under the names that this source has for them."""
        return [replace(leaf, tensor=leaf.path, transposed=False) for leaf in leaves] if self.is_own else leaves

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one parameter, from the metadata."""
        found = self._names[name]
        shape = tuple(getattr(self._stored[found.path][1], "shape", None) or ())
        return shape[::-1] if found.transposed else shape

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One parameter, on the host."""
        import orbax.checkpoint as ocp

        found = self._names[name]
        (values,) = self._restore({found.path: ocp.RestoreArgs(restore_type=np.ndarray)})
        return np.asarray(values).T if found.transposed else np.asarray(values)

    def parameters(self, leaves: list[Leaf], dtype: str, placement: Placement) -> list[Shaped[Array, "..."]]:
        """Parameters of a model, each restored straight onto its devices; CheckpointError if one is not finite."""
        import orbax.checkpoint as ocp

        direct: dict[str, Leaf] = {}  # those that are not stored the other way around, which is undone on the host
        for leaf in leaves:
            found = self._names.get(leaf.tensor)
            if found is not None and found.transposed == leaf.transposed:
                direct[found.path] = leaf
        restored = self._restore(
            {
                path: ocp.ArrayRestoreArgs(dtype=jnp.dtype(dtype), sharding=placement(leaf.path, leaf.shape))
                for path, leaf in direct.items()
            }
        )
        arrays = {leaf.path: array for leaf, array in zip(direct.values(), restored, strict=True)}
        for path, leaf in direct.items():
            if not bool(jnp.isfinite(arrays[leaf.path]).all()):
                raise CheckpointError(self.path, f"{path!r} holds NaN or infinity.")
        return [
            arrays[leaf.path] if leaf.path in arrays else put(read_float(self, leaf, dtype), leaf.path, placement)
            for leaf in leaves
        ]

    def tokenizer(self) -> Any | None:
        """The tokenizer beside the config.json."""
        return read_tokenizer(self.config_file.parent)

    def _restore(self, how: dict[str, Any]) -> list[Any]:
        """The arrays at the paths of `how`, which says into what each is restored."""
        import orbax.checkpoint as ocp

        wanted = {}
        for path, restore_args in how.items():
            keys, stored = self._stored[path]
            if jnp.dtype(stored.dtype) not in FLOAT_DTYPES:
                floats = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
                raise CheckpointError(self.path, f"{path!r} is {stored.dtype}, not a float weight ({floats}).")
            wanted[keys] = restore_args

        def over_tree(value: Callable[[Any], Any], other: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda at, _: value(at) if at in wanted else other, self._tree)

        args = ocp.args.PyTreeRestore(
            item=over_tree(lambda at: 0, ocp.PLACEHOLDER),
            restore_args=over_tree(wanted.__getitem__, ocp.RestoreArgs()),
        )
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.restore(self.path, args=args)
        except Exception as error:  # Orbax lets many kinds through
            raise CheckpointError(self.path, f"cannot be restored: {first_line(error)}") from error
        arrays = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
        return [arrays[keys] for keys in wanted]


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax checkpoint, or holds the steps or items of one."""
    return path.is_dir() and next(_trees(path), None) is not None


def find_tree(path: Path) -> Path:
    """The checkpoint of one tree at or below `path`: of the last step, and of its only item.

    Raises:
        CheckpointError: there is none, or there are several items.
    """
    found = list(_trees(path))
    if not found:
        raise CheckpointError(path, "is no Orbax checkpoint of a tree: it has none of " + ", ".join(MARKS) + ".")
    if len(found) > 1:
        names = " and ".join(str(each.relative_to(path)) for each in found)
        raise CheckpointError(path, f"holds {names}: give the path of the one with the parameters.")
    return found[0]


def _trees(path: Path) -> Iterator[Path]:
    if any((path / mark).is_file() for mark in MARKS):
        yield path
        return
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    steps = {folder: int(found[1]) for folder in folders if (found := STEP.fullmatch(folder.name))}
    if steps:
        yield from _trees(max(steps, key=steps.__getitem__))
    else:
        yield from (item for item in sorted(folders) if any((item / mark).is_file() for mark in MARKS))


def _metadata(path: Path) -> Any:
    """The tree with its arrays' shapes and dtypes."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(path)
        tree = found.item_metadata.tree
    except Exception as error:  # as in restoring
        raise CheckpointError(path, f"cannot be read by Orbax: {first_line(error)}") from error
    return tree


def _names(keys: tuple[Any, ...]) -> list[str]:
    """A path's names, without the ".value" that a Flax NNX state ends in."""
    names = [str(entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key) for entry in keys]
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names
