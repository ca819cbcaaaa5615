"""Open any model: a store of this library's, or a float checkpoint read into parameters."""

import re
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptq_jax.models.base import Architecture, Model
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.models.tensor_parallel import Rules
from gptq_jax.storage.adapted import AdaptedTree
from gptq_jax.storage.base import CheckpointError, TensorSource
from gptq_jax.storage.fields import raise_problems
from gptq_jax.storage.flax_tree import as_flax_tree, is_flax, open_flax
from gptq_jax.storage.gguf import GgufFile
from gptq_jax.storage.orbax_tree import OrbaxTree, is_orbax
from gptq_jax.storage.packed.detect import PACKED_KEYS, packed_format
from gptq_jax.storage.packed.read import describe_packed, read_packed_params
from gptq_jax.storage.parameters import (
    MISFIT,
    Leaf,
    float_problems,
    leaves_of,
    left_over_problems,
    put,
    read_float,
    stored_parts,
)
from gptq_jax.storage.safetensors import SafetensorsDirectory
from gptq_jax.storage.safetensors_header import first_line
from gptq_jax.storage.sharding import (
    MeshPlacement,
    Placement,
    PlacementWarning,
    as_placement,
    one_device,
    place_on_mesh,
)
from gptq_jax.storage.store import is_store, load_store, read_shapes

ACCEPTED = "a .gguf file, a directory with config.json and safetensors or flax_model.msgpack, or a Hub id like org/name"
NEEDS_CONFIG = (
    "does not say what model it is: name the config.json of its architecture by arch_config (--arch-config on the "
    "command line)."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
HUB_FLAX_FILES = ["flax_model*.msgpack"]
HUB_OTHERS = ["*/*", "consolidated*"]  # the same weights in other layouts
PARAM_DTYPES = ("float32", "bfloat16")


def load(
    path_or_id: str | PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    sharding: jax.sharding.Sharding | Placement | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    arch_config: str | PathLike[str] | None = None,
    module: Any = None,
) -> Any:
    """Load a model: a `Model`, or an `AdaptedModel` where `module` is given.

    Args:
        path_or_id: a directory that `save` wrote, or what `open_source` takes. Weights that GPTQ, AWQ or
            compressed-tensors packed stay packed.
        dtype: of a checkpoint's float parameters: float32 or bfloat16. A saved model keeps its own.
        sharding: where arrays go as they are read: one sharding for all, or a function of an array's name and
            shape, like `ShardingRules`. None: the first device, or `mesh`.
        mesh: devices to cut the model over; each reads its part. `prepare` the model to run it, if it is packed.
        rules: how: pairs of a regex and a PartitionSpec, as for `place_on_mesh`. None: Megatron-LM's tensor
            parallelism over the mesh's only axis, or the one called "model"; a warning names what is cut otherwise.
        arch_config: the config.json that says what model it is, for what does not carry one: an Orbax checkpoint of
            parameters, or a file of flax.serialization. A tokenizer is looked for beside it.
        module: the user's own Linen or NNX module (of shapes only, from `nnx.eval_shape`, will do), for a directory
            that was saved of one.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: it is damaged or does not fit its config.
        ValueError: its architecture or `dtype` is not supported, or `rules` do not fit it or the mesh.
    """
    if mesh is not None and sharding is not None:
        raise ValueError("sharding and mesh both say where arrays go: give one of them.")
    if mesh is None and rules is not None:
        raise ValueError("rules cut a model over a mesh: give mesh too.")
    dtype, placement = dtype_name(dtype), as_placement(sharding)
    if is_store(Path(path_or_id)) and arch_config is None:
        if mesh is not None:
            stored, shapes, _ = read_shapes(Path(path_or_id))
            placement = _on_mesh(None if isinstance(stored, AdaptedTree) else stored, shapes, mesh, rules)
        return load_store(path_or_id, placement, module)
    if module is not None:
        raise ValueError(f"{path_or_id} was not written by save, so that module says nothing: use adapt instead.")
    source = open_source(path_or_id, arch_config)
    config = read_architecture(source)
    tokenizer = source.tokenizer()  # before the weights: cheap to find missing or broken
    if mesh is not None:
        placement = _on_mesh(config, read_param_shapes(source, config), mesh, rules)
    # The parameters say themselves which grids they have.
    plain = {key: value for key, value in source.config.items() if key not in PACKED_KEYS}
    return Model(config, read_params(source, config, dtype, placement), tokenizer, plain)


def _on_mesh(config: Any, shapes: Any, mesh: jax.sharding.Mesh, rules: Rules | None) -> MeshPlacement:
    placement = place_on_mesh(config, shapes, mesh, rules)
    if placement.notes:
        warnings.warn(f"{'; '.join(placement.notes)}.", PlacementWarning, stacklevel=3)
    return placement


def read_param_shapes(source: TensorSource, architecture: Architecture) -> Any:
    """The parameters as shapes, QuantizedTensors of shapes where the checkpoint packs them; errors as `read_params`."""
    if (packed := packed_format(source)) is not None:
        return describe_packed(packed, architecture)[0]
    leaves_of(source, architecture)  # the number of layers is believable
    return architecture.abstract_params()


def read_architecture(source: TensorSource) -> Architecture:
    """The architecture of a checkpoint; CheckpointError if its config describes none."""
    try:
        return architecture_from_config(source.config)
    except ValueError as error:
        raise CheckpointError(source.config_file, str(error)) from None


def open_source(path_or_id: str | PathLike[str], arch_config: str | PathLike[str] | None = None) -> TensorSource:
    """Open a GGUF file, a Hugging Face directory, a model of the Hugging Face Hub, or parameters without a config.

    A Hub model is downloaded to the usual cache, its config and tokenizer files and its safetensors only, or, where it
    has none, its Flax weights.

    Args:
        path_or_id: what to open.
        arch_config: as for `load`.

    Raises:
        FileNotFoundError: there is nothing at the path, or the Hub cannot be reached or has no such model.
        CheckpointError: what is there cannot be used.
    """
    path = Path(path_or_id)
    if arch_config is not None:
        return _open_bare(path, Path(arch_config))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return GgufFile(path)
        if is_flax(path):
            raise CheckpointError(path, NEEDS_CONFIG)
        raise CheckpointError(path, f"is not a checkpoint: give {ACCEPTED}.")
    if path.is_dir():
        if (path / "config.json").is_file():
            return _open_directory(path)
        if is_orbax(path) or is_flax(path):
            raise CheckpointError(path, NEEDS_CONFIG)
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"did you mean {path / found[0]}?" if found else f"give {ACCEPTED}."
        raise CheckpointError(path, f"has no config.json: {hint}")
    if isinstance(path_or_id, str) and HUB_ID.fullmatch(path_or_id):
        return _open_directory(Path(_download(path_or_id)))
    raise FileNotFoundError(f"{path_or_id} does not exist: give {ACCEPTED}.")


def _open_bare(path: Path, config_file: Path) -> TensorSource:
    """Parameters whose architecture another file describes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give an Orbax checkpoint or a file of flax.serialization.")
    if config_file.is_dir():
        config_file = config_file / "config.json"
    if is_flax(path):
        return open_flax(path, config_file)
    if is_store(path.parent):
        raise CheckpointError(path, f"is part of a directory that gptq_jax.save wrote: load {path.parent}.")
    if not is_store(path) and is_orbax(path):
        return OrbaxTree(path, config_file)
    raise CheckpointError(
        path, "takes no arch_config (--arch-config), which is for Orbax checkpoints and Flax's msgpack files only."
    )


def _open_directory(path: Path) -> TensorSource:
    if is_flax(path):
        return open_flax(path, path / "config.json")
    source = SafetensorsDirectory(path)
    return as_flax_tree(source) or source


def read_params(
    source: TensorSource,
    architecture: Architecture,
    dtype: DTypeLike = "float32",
    placement: Placement = one_device,
) -> Any:
    """Read a model's parameters, one tensor at a time.

    Args:
        source: the checkpoint.
        architecture: says which tensor each leaf of the parameter tree is.
        dtype: of the parameters: float32 or bfloat16.
        placement: where each array goes as soon as it is read.

    Returns:
        The tree of `architecture.abstract_params()`, arrays in place of shapes; kernels are [d_in, d_out], or
        QuantizedTensors where the checkpoint packs them.

    Raises:
        CheckpointError: tensors are missing, of the wrong shape, left over, or not finite.
    """
    dtype = dtype_name(dtype)
    if (packed := packed_format(source)) is not None:
        return read_packed_params(packed, architecture, dtype, placement)
    leaves, structure = checked_leaves(source, architecture)
    return jax.tree_util.tree_unflatten(structure, read_arrays(source, leaves, dtype, placement))


def checked_leaves(source: TensorSource, architecture: Architecture) -> tuple[list[Leaf], Any]:
    """The parameters of a float model in the order of its tree, and the structure that they fill.

    Raises:
        CheckpointError: tensors are missing, of the wrong shape, or left over.
    """
    leaves, structure = leaves_of(source, architecture)
    if isinstance(source, OrbaxTree):
        leaves = source.named(leaves)
    problems = float_problems(source, leaves)
    problems += left_over_problems(source, {leaf.tensor for leaf in stored_parts(leaves)})
    beside = source.config_file in (source.path, source.path / "config.json")
    misfit = MISFIT if beside else f"does not fit {source.config_file} (is it of this model?): "
    raise_problems(source.path, problems, misfit)
    return leaves, structure


def read_arrays(source: TensorSource, leaves: list[Leaf], dtype: str, placement: Placement) -> list[Any]:
    """Some of `checked_leaves`; CheckpointError if one is not finite."""
    if isinstance(source, OrbaxTree):
        return source.parameters(leaves, dtype, placement)
    return [put(read_float(source, leaf, dtype), leaf.path, placement) for leaf in leaves]


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype that parameters can have, or ValueError."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in PARAM_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use {' or '.join(PARAM_DTYPES)}.")
    return name


def _download(model_id: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        path = snapshot_download(model_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHERS)
        if not any(Path(path).glob("*.safetensors")):  # only then: many models are there in both
            snapshot_download(model_id, allow_patterns=HUB_FLAX_FILES, ignore_patterns=HUB_OTHERS)
        return path
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{model_id} is no local path and no model of the Hugging Face Hub that you can access."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"{model_id} is no local path, and the Hugging Face Hub cannot be reached: give {ACCEPTED}."
        ) from None
    except OSError as error:
        raise FileNotFoundError(f"{model_id} cannot be downloaded: {first_line(error)}") from error
