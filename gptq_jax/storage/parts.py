"""The arrays of a store in parts, one Orbax checkpoint each: embed, layers.0, layers.1, ..., head.

A part is written by Orbax's handler itself rather than its Checkpointer, and without OCDBT, whose files have random
names and times: equal arrays make equal bytes. It is a checkpoint like any other to whoever restores it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptq_jax.parallel.hosts import on_first, spread, wait_for_all
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.directory import STORE_MARK as MANIFEST
from gptq_jax.storage.manifest import ARRAYS, file_entries
from gptq_jax.storage.safetensors_header import first_line
from gptq_jax.storage.sharding import Placement, one_device
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import packed_words

WHOLE = "module"  # the only part of a user's own module, whose tree can be any
_FIELDS = ("codes", "scales", "zeros", "group_of_row")
_FLOATS = ("float32", "bfloat16", "float16")
_DTYPES = {  # that each array of a packed kernel may have
    ".codes": ("uint32",),
    ".scales": _FLOATS,
    ".zeros": ("uint8", *_FLOATS),
    ".group_of_row": ("int32",),
}


@dataclass(frozen=True)
class Part:
    """What the manifest says of one part, or of all.

    Attributes:
        quantized: the grid of each packed layer by its path in the model, as plain data.
        dtypes: of each array by its name in the model.
        files: see `file_entries`.
    """

    quantized: dict[str, Any]
    dtypes: dict[str, str]
    files: dict[str, Any]


def parts_of(params: Any) -> dict[str, Any]:
    """The parameters of a model by part."""
    if "layers" not in params:
        return {WHOLE: params}
    layers = {f"layers.{index}": block for index, block in enumerate(params["layers"])}
    return {"embed": params["embed"], **layers, "head": params["head"]}


def joined(parts: Mapping[str, Any]) -> Any:
    """The inverse of `parts_of`."""
    if WHOLE in parts:
        return parts[WHOLE]
    layers = [parts[f"layers.{index}"] for index in range(len(parts) - 2)]
    return {"embed": parts["embed"], "layers": layers, "head": parts["head"]}


def prefix_of(part: str) -> str:
    """What the names of a part's arrays begin with in the model."""
    return "" if part == WHOLE else f"{part}."


def write_part(directory: Path, part: str, params: Any) -> Part:
    """Write one part to a new directory.

    One process gathers sharded arrays on the host, so that the files tell no devices; of several, each writes some.

    Args:
        directory: to make.
        part: its name; in the store its files will be in arrays/NAME.
        params: the tree, with QuantizedTensors.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    prefix = prefix_of(part)
    several = jax.process_count() > 1
    arrays = spread(unpacked(params)) if several else jax.tree.map(np.asarray, unpacked(params))
    on_first(lambda: directory.mkdir(parents=True))
    if jax.tree.leaves(arrays):  # Orbax takes no empty tree
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
        try:
            handler.save(epath.Path(directory), args=ocp.args.PyTreeSave(arrays))
        finally:
            handler.close()
    wait_for_all(f"{part} is written")
    files = on_first(lambda: file_entries((file for file in directory.rglob("*") if file.is_file()), directory))
    return Part(
        quantized={prefix + path: asdict(tensor.spec) for path, tensor in packed_layers(params).items()},
        dtypes={prefix + name_of(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)},
        files={f"{ARRAYS}/{part}/{name}": entry for name, entry in files.items()},
    )


def read_part(directory: Path, target: Any) -> Any:
    """Restore one Orbax checkpoint onto the devices that `target`, a tree of shapes, gives its arrays.

    Raises:
        CheckpointError: it does not hold such a tree.
    """
    import orbax.checkpoint as ocp

    if not jax.tree.leaves(target):
        return target
    args = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.restore(directory, args=args)
    except Exception as error:  # Orbax lets many kinds through
        raise CheckpointError(directory, f"cannot be restored: {first_line(error)}") from error
    finally:
        handler.close()


def stored_shapes(path: Path, entries: Part, abstract: Any, prefix: str = "", placement: Placement = one_device) -> Any:
    """The tree of arrays that is stored: that of shapes `abstract`, with the arrays of packed kernels in their place.

    Args:
        path: of the store, for errors.
        entries: of the part or of the whole store.
        abstract: of the model, or of the part whose arrays' names begin with `prefix`.
        prefix: see there.
        placement: of each array.

    Raises:
        CheckpointError: an array has a dtype that it cannot have.
    """
    quantized, dtypes = grids(path, entries.quantized), entries.dtypes

    def expected(where: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        name = prefix + name_of(where)
        layer = name.removesuffix(".kernel")
        shapes: Any = {"": leaf.shape}
        if layer in quantized:
            spec, (*stack, d_in, d_out) = quantized[layer], leaf.shape
            grid = (*stack, spec.groups(d_in), d_out)
            shapes = {".codes": (*stack, packed_words(d_in, spec.bits), d_out), ".scales": grid}
            if not spec.symmetric:
                shapes[".zeros"] = grid
            if f"{name}.group_of_row" in dtypes:
                shapes[".group_of_row"] = (*stack, d_in)
        arrays = {}
        for field, shape in shapes.items():
            if dtypes.get(name + field) not in _DTYPES.get(field, _FLOATS):
                raise CheckpointError(path / MANIFEST, f"gives {name + field} the dtype {dtypes.get(name + field)!r}.")
            arrays[field.removeprefix(".")] = jax.ShapeDtypeStruct(
                shape, jnp.dtype(dtypes[name + field]), sharding=placement(name + field, shape)
            )
        return arrays if layer in quantized else arrays[""]

    return jax.tree_util.tree_map_with_path(expected, abstract)


def grids(path: Path, quantized: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """The grids in a manifest; CheckpointError for one that cannot be."""
    found = {}
    for layer, fields in quantized.items():
        try:
            found[layer] = QuantSpec(**fields)
        except (TypeError, ValueError) as error:
            raise CheckpointError(path / MANIFEST, f"holds a grid of {layer} that cannot be: {error}") from error
        if type(found[layer].bits) is not int or type(found[layer].symmetric) is not bool:
            raise CheckpointError(path / MANIFEST, f"holds a grid of {layer} that cannot be: {fields}.")
    return found


def unpacked(params: Any) -> Any:
    """Each QuantizedTensor as a dict of its arrays, which any user of Orbax can read."""
    return jax.tree.map(
        lambda leaf: (
            {name: array for name in _FIELDS if (array := getattr(leaf, name)) is not None}
            if _is_packed(leaf)
            else leaf
        ),
        params,
        is_leaf=_is_packed,
    )


def repacked(arrays: Any, quantized: Mapping[str, Any], abstract: Any, prefix: str = "") -> Any:
    """The inverse of `unpacked`; `abstract` and `prefix` as for `stored_shapes`."""

    def build(where: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, stored: Any) -> Any:
        layer = (prefix + name_of(where)).removesuffix(".kernel")
        if layer not in quantized:
            return stored
        return QuantizedTensor(
            **{name: stored.get(name) for name in _FIELDS},
            spec=QuantSpec(**quantized[layer]),
            d_in=leaf.shape[-2],
        )

    return jax.tree_util.tree_map_with_path(build, abstract, arrays)


def packed_layers(params: Any) -> dict[str, QuantizedTensor]:
    """The packed kernels by the path of their layer, like "layers.3.mlp.down_proj"."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
    return {name_of(path).removesuffix(".kernel"): leaf for path, leaf in leaves if _is_packed(leaf)}


def name_of(path: tuple[Any, ...]) -> str:
    """A path in a tree with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)
