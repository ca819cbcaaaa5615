"""The library's own directory: packed arrays in Orbax, everything else as JSON, all of it checked on load.

DIR/gptq_jax.json   version, grids of the packed kernels, size and SHA-256 of every other file and of itself
DIR/config.json     the model's Hugging Face config
DIR/report.json     the quantization report, without what depends on time
DIR/run.json        what a run that could be resumed was made of
DIR/arrays/PART/    an Orbax checkpoint for each part of the parameters; a packed kernel is a dict of its arrays
DIR/tokenizer...    as transformers writes them

Equal models make directories of equal bytes.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from gptq_jax.matmul import holds_prepared
from gptq_jax.models.adapted import AdaptedModel
from gptq_jax.models.base import Architecture, Model, check_no_lora
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.report import without_times
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.adapted import ADAPTED, AdaptedTree, adapted_again, stored_form
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.directory import check_target, replacing, write_json
from gptq_jax.storage.manifest import ARRAYS, CONFIG, MANIFEST, REPORT, read_json, read_manifest, verify, write_manifest
from gptq_jax.storage.parts import (
    Part,
    joined,
    name_of,
    packed_layers,
    parts_of,
    read_part,
    repacked,
    stored_shapes,
    write_part,
)
from gptq_jax.storage.sharding import Placement, one_device
from pallas_kernels.packing import packed_words

__all__ = ["is_store", "load_store", "packed_layers", "planned_bytes", "read_shapes", "save", "tree_bytes"]

OWN_MODULE = "holds a module of your own: pass it, load(path, module=...)."
NO_MODULE = "holds a supplied architecture: load it without module."


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
    if isinstance(model, AdaptedModel):
        params, source = stored_form(model)
    else:
        check_no_lora(model, "saved")
        params, source = model.params, model.source
    if holds_prepared(params):
        raise ValueError("the model's weights are prepared to run here: save the model it was prepared from.")
    check_target(path, overwrite=overwrite, nbytes=tree_bytes(params))
    with replacing(Path(path)) as partial:
        parts = [write_part(partial / ARRAYS / name, name, tree) for name, tree in parts_of(params).items()]
        complete(partial, parts, source=source, report=model.report, tokenizer=model.tokenizer)


def complete(
    folder: Path, parts: Iterable[Part], *, source: dict[str, Any], report: dict[str, Any] | None, tokenizer: Any
) -> None:
    """Write all of a store that is not arrays, whose entries in the manifest are `parts`."""
    write_json(folder / CONFIG, source)
    if report is not None:
        write_json(folder / REPORT, without_times(report))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    merged = Part({}, {}, {})
    for part in parts:
        merged = Part(merged.quantized | part.quantized, merged.dtypes | part.dtypes, merged.files | part.files)
    write_manifest(folder, merged.quantized, merged.dtypes, merged.files)


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
    path = Path(path).absolute()
    manifest = read_manifest(path)
    verify(path, manifest["files"])
    source, config, report = _described(path, manifest)
    if isinstance(config, AdaptedTree) is (module is None):
        raise CheckpointError(path, OWN_MODULE if module is None else NO_MODULE)
    target = _target(path, manifest, config, placement)
    if manifest["version"] == 1:
        arrays = read_part(path / ARRAYS, target)
    else:
        arrays = joined({name: read_part(path / ARRAYS / name, part) for name, part in parts_of(target).items()})
    params = repacked(arrays, manifest["quantized"], config.abstract_params())
    tokenizer = _tokenizer(path, manifest["files"])
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
    verify(path, {name: entry for name, entry in manifest["files"].items() if name in (CONFIG, REPORT)})
    _, config, report = _described(path, manifest)
    return config, repacked(_target(path, manifest, config), manifest["quantized"], config.abstract_params()), report


def planned_bytes(model: Model, specs: dict[str, QuantSpec | None]) -> int:
    """Bytes of `model` once its layers are on these grids; a bound where groups may be reordered."""
    total = tree_bytes(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        spec = specs.get(name_of(path).removesuffix(".kernel"))
        if spec is not None:
            *stack, d_in, d_out = leaf.shape
            one = 4 * (packed_words(d_in, spec.bits) * d_out + d_in) + 5 * spec.groups(d_in) * d_out
            total += math.prod(stack) * one - leaf.size * leaf.dtype.itemsize
    return total


def tree_bytes(params: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _described(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any] | None]:
    """The config as it is stored, the architecture it describes, and the report."""
    source = read_json(path / CONFIG)
    try:
        config: Any = AdaptedTree.from_json(source[ADAPTED]) if ADAPTED in source else architecture_from_config(source)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(path / CONFIG, f"describes no model: {error}") from error
    report = read_json(path / REPORT) if REPORT in manifest["files"] else None
    if not isinstance(report, dict | None):
        raise CheckpointError(path / REPORT, "is not a report.")
    return source, config, report


def _target(path: Path, manifest: dict[str, Any], config: Any, placement: Placement = one_device) -> Any:
    """The tree to restore, as shapes."""
    abstract = config.abstract_params()
    names = [name_of(where) for where, _ in jax.tree_util.tree_leaves_with_path(abstract)]
    packable = (
        config.packable if isinstance(config, AdaptedTree) else {name for name in names if name.endswith(".kernel")}
    )
    kernels = {name.removesuffix(".kernel") for name in packable}
    if unknown := sorted(set(manifest["quantized"]) - kernels):
        raise CheckpointError(path / MANIFEST, f"holds grids of {unknown}, which are no layers of the model.")
    entries = Part(manifest["quantized"], manifest["dtypes"], manifest["files"])
    return stored_shapes(path, entries, abstract, placement=placement)


def _tokenizer(path: Path, files: dict[str, Any]) -> Any:
    if "tokenizer.json" not in files:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
