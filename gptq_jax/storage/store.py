"""The library's own directory: packed arrays in Orbax, everything else as JSON, all of it checked on load.

DIR/gptq_jax.json   version, grids of the packed kernels, size and SHA-256 of every other file and of itself
DIR/config.json     the model's Hugging Face config
DIR/report.json     the quantization report
DIR/arrays/         the parameter tree, an Orbax checkpoint; a packed kernel is a dict of its arrays
DIR/tokenizer...    as transformers writes them
"""

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.matmul import holds_prepared
from gptq_jax.models.adapted import AdaptedModel
from gptq_jax.models.base import Architecture, Model, check_no_lora
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.adapted import ADAPTED, AdaptedTree, adapted_again, stored_form
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.directory import STORE_MARK as MANIFEST
from gptq_jax.storage.directory import check_target, replacing, write_json
from gptq_jax.storage.sharding import Placement, one_device
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import packed_words

VERSION = 1
OWN_MODULE = "holds a module of your own: pass it, load(path, module=...)."
NO_MODULE = "holds a supplied architecture: load it without module."
_ARRAYS, _CONFIG, _REPORT = "arrays", "config.json", "report.json"


def is_store(path: Path) -> bool:
    """Whether a directory was written by `save`."""
    return (path / MANIFEST).is_file()


def save(model: Model | AdaptedModel, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model, float or quantized, to a directory.

    The directory appears under its name only when all of it is on disk.

    Args:
        model: as `load`, `adapt` or `quantize` gave it.
        path: of the directory; its parent must exist.
        overwrite: replace a directory this function wrote before.

    Raises:
        OSError: see `check_target`.
        ValueError: the model's weights are prepared to run, or carry LoRA adapters.
    """
    import orbax.checkpoint as ocp

    if isinstance(model, AdaptedModel):
        params, source = stored_form(model)
    else:
        check_no_lora(model, "saved")
        params, source = model.params, model.source
    if holds_prepared(params):
        raise ValueError("the model's weights are prepared to run here: save the model it was prepared from.")
    path = Path(path).absolute()
    check_target(path, overwrite=overwrite, nbytes=tree_bytes(params))
    arrays = _unpacked(params)
    with replacing(path) as partial:
        write_json(partial / _CONFIG, source)
        if model.report is not None:
            write_json(partial / _REPORT, model.report)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(partial / _ARRAYS, arrays)
        written = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest = {
            "format": "gptq-jax",
            "version": VERSION,
            "quantized": {path: asdict(tensor.spec) for path, tensor in packed_layers(params).items()},
            "dtypes": {_name(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)},
            "files": {
                str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
                for file in written
            },
        }
        write_json(partial / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def load_store(
    path: str | os.PathLike[str], placement: Placement = one_device, module: Any = None
) -> Model | AdaptedModel:
    """Read what `save` wrote; packed arrays stay packed.

    Args:
        path: of the directory.
        placement: the sharding of each array, which goes straight to its devices.
        module: the user's own, where the model was adapted from one.

    Raises:
        CheckpointError: a file is missing, damaged, or of another version, by name; or `module` is missing, or is
            not what was saved.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    manifest = read_manifest(path)
    _verify(path, manifest["files"])
    source, config, report = _described(path, manifest)
    if isinstance(config, AdaptedTree) is (module is None):
        raise CheckpointError(path, OWN_MODULE if module is None else NO_MODULE)
    target = _target(path, manifest, config, placement)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(
                path / _ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                ),
            )
    except Exception as error:  # Orbax lets many kinds through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(path / _ARRAYS, f"cannot be restored: {reason}") from error
    params, tokenizer = _repacked(arrays, manifest["quantized"], config), _tokenizer(path, manifest["files"])
    if isinstance(config, AdaptedTree):
        return adapted_again(config, module, params, tokenizer, report, path)
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        source=source,
        report=report,
    )


def read_shapes(path: Path) -> tuple[Architecture | AdaptedTree, Any, dict[str, Any] | None]:
    """The architecture, the parameters as shapes (packed ones as QuantizedTensors of shapes), and the report."""
    path = path.absolute()
    manifest = read_manifest(path)
    _verify(path, {name: entry for name, entry in manifest["files"].items() if name in (_CONFIG, _REPORT)})
    _, config, report = _described(path, manifest)
    return config, _repacked(_target(path, manifest, config), manifest["quantized"], config), report


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of gptq_jax.json, its version and its own checksum checked."""
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "gptq-jax":
        raise CheckpointError(path / MANIFEST, "is not a manifest of gptq-jax.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            path / MANIFEST,
            f"is of version {manifest.get('version')}, but this gptq-jax reads version {VERSION}.",
        )
    found = manifest.pop("sha256", None)
    if found != manifest_digest(manifest):
        raise CheckpointError(path / MANIFEST, "is damaged: its SHA-256 is not the one that was written.")
    for table in ("quantized", "dtypes", "files"):
        if not isinstance(manifest.get(table), dict):
            raise CheckpointError(path / MANIFEST, f"has no table {table!r}.")
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(path / MANIFEST, f"lists {name!r}, which lies outside the directory.")
        if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry):
            raise CheckpointError(path / MANIFEST, f"gives {name!r} no size and SHA-256.")
    if _CONFIG not in manifest["files"]:
        raise CheckpointError(path / MANIFEST, f"does not list {_CONFIG}.")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def packed_layers(params: Any) -> dict[str, QuantizedTensor]:
    """The packed kernels by the path of their layer, like "layers.3.mlp.down_proj"."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
    return {_name(path).removesuffix(".kernel"): leaf for path, leaf in leaves if _is_packed(leaf)}


def planned_bytes(model: Model, specs: dict[str, QuantSpec | None]) -> int:
    """Bytes of `model` once its layers are on these grids; a bound where groups may be reordered."""
    total = tree_bytes(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        spec = specs.get(_name(path).removesuffix(".kernel"))
        if spec is not None:
            *stack, d_in, d_out = leaf.shape
            one = 4 * (packed_words(d_in, spec.bits) * d_out + d_in) + 5 * spec.groups(d_in) * d_out
            total += math.prod(stack) * one - leaf.size * leaf.dtype.itemsize
    return total


def tree_bytes(params: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _unpacked(params: Any) -> Any:
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


_FIELDS = ("codes", "scales", "zeros", "group_of_row")
_FLOATS = ("float32", "bfloat16", "float16")
_DTYPES = {  # that each array of a packed kernel may have
    ".codes": ("uint32",),
    ".scales": _FLOATS,
    ".zeros": ("uint8", *_FLOATS),
    ".group_of_row": ("int32",),
}


def _described(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any] | None]:
    """The config as it is stored, the architecture it describes, and the report."""
    source = _read_json(path / _CONFIG)
    try:
        config: Any = AdaptedTree.from_json(source[ADAPTED]) if ADAPTED in source else architecture_from_config(source)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(path / _CONFIG, f"describes no model: {error}") from error
    report = _read_json(path / _REPORT) if _REPORT in manifest["files"] else None
    if not isinstance(report, dict | None):
        raise CheckpointError(path / _REPORT, "is not a report.")
    return source, config, report


def _target(path: Path, manifest: dict[str, Any], config: Any, placement: Placement = one_device) -> Any:
    """The tree to restore, as shapes: the architecture's, with the arrays of packed kernels in their place."""
    dtypes, quantized = manifest["dtypes"], _grids(path, manifest)
    leaves = jax.tree_util.tree_leaves_with_path(config.abstract_params())
    names = [_name(where) for where, _ in leaves]
    packable = (
        config.packable if isinstance(config, AdaptedTree) else {name for name in names if name.endswith(".kernel")}
    )
    kernels = {name.removesuffix(".kernel") for name in packable}
    if unknown := sorted(set(quantized) - kernels):
        raise CheckpointError(path / MANIFEST, f"holds grids of {unknown}, which are no layers of the model.")

    def expected(where: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        name = _name(where)
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

    return jax.tree_util.tree_map_with_path(expected, config.abstract_params())


def _grids(path: Path, manifest: dict[str, Any]) -> dict[str, QuantSpec]:
    grids = {}
    for layer, fields in manifest["quantized"].items():
        try:
            grids[layer] = QuantSpec(**fields)
        except (TypeError, ValueError) as error:
            raise CheckpointError(path / MANIFEST, f"holds a grid of {layer} that cannot be: {error}") from error
        if type(grids[layer].bits) is not int or type(grids[layer].symmetric) is not bool:
            raise CheckpointError(path / MANIFEST, f"holds a grid of {layer} that cannot be: {fields}.")
    return grids


def _repacked(arrays: Any, quantized: dict[str, Any], config: Any) -> Any:
    """The inverse of `_unpacked`."""

    def build(where: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, stored: Any) -> Any:
        layer = _name(where).removesuffix(".kernel")
        if layer not in quantized:
            return stored
        return QuantizedTensor(
            **{name: stored.get(name) for name in _FIELDS},
            spec=QuantSpec(**quantized[layer]),
            d_in=leaf.shape[-2],
        )

    return jax.tree_util.tree_map_with_path(build, config.abstract_params(), arrays)


def _verify(path: Path, files: dict[str, Any]) -> None:
    """Sizes first, which costs nothing, then content."""
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(file, "is missing.")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(file, f"has {file.stat().st_size} bytes, but {entry['bytes']} were written.")
    for name, entry in files.items():
        if _digest(path / name) != entry["sha256"]:
            raise CheckpointError(path / name, "is damaged: its SHA-256 is not the one that was written.")


def _tokenizer(path: Path, files: dict[str, Any]) -> Any:
    if "tokenizer.json" not in files:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(path, "is missing.") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}.") from None
