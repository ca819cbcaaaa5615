"""Open any model: a store of this library's, or a float checkpoint read into parameters."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from gptq_jax.models.base import Architecture, Model
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.base import CheckpointError, TensorSource
from gptq_jax.storage.gguf import GgufFile
from gptq_jax.storage.safetensors import SafetensorsDirectory, first_line
from gptq_jax.storage.sharding import Placement, as_placement, one_device
from gptq_jax.storage.store import is_store, load_store

ACCEPTED = "a .gguf file, a directory with config.json and safetensors, or a Hugging Face id like org/name"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
PARAM_DTYPES = ("float32", "bfloat16")
# Constants that old checkpoints store although the model computes them.
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def load(
    path_or_id: str | PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    sharding: jax.sharding.Sharding | Placement | None = None,
) -> Model:
    """Load a model.

    Args:
        path_or_id: a directory that `save` wrote, or what `open_source` takes.
        dtype: of a float checkpoint's parameters: float32 or bfloat16. A saved model keeps its own.
        sharding: where arrays go as they are read: one sharding for all, or a function of an array's name and
            shape, like `ShardingRules`. None: the first device.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: it is damaged or does not fit its config.
        ValueError: its architecture or `dtype` is not supported.
    """
    dtype, placement = _dtype_name(dtype), as_placement(sharding)
    if is_store(Path(path_or_id)):
        return load_store(path_or_id, placement)
    source = open_source(path_or_id)
    config = architecture_from_config(source.config)
    tokenizer = source.tokenizer()  # before the weights: cheap to find missing or broken
    return Model(config, read_params(source, config, dtype, placement), tokenizer, source.config)


def open_source(path_or_id: str | PathLike[str]) -> TensorSource:
    """Open a GGUF file, a Hugging Face directory, or a model of the Hugging Face Hub.

    A Hub model is downloaded to the usual cache, its safetensors, config and tokenizer files only.

    Raises:
        FileNotFoundError: there is nothing at the path, or the Hub cannot be reached or has no such model.
        CheckpointError: what is there cannot be used.
    """
    path = Path(path_or_id)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return GgufFile(path)
        raise CheckpointError(path, f"is not a checkpoint: give {ACCEPTED}.")
    if path.is_dir():
        if (path / "config.json").is_file():
            return SafetensorsDirectory(path)
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"did you mean {path / found[0]}?" if found else f"give {ACCEPTED}."
        raise CheckpointError(path, f"has no config.json: {hint}")
    if isinstance(path_or_id, str) and HUB_ID.fullmatch(path_or_id):
        return SafetensorsDirectory(_download(path_or_id))
    raise FileNotFoundError(f"{path_or_id} does not exist: give {ACCEPTED}.")


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
        The tree of `architecture.abstract_params()`, arrays in place of shapes; kernels are [d_in, d_out].

    Raises:
        CheckpointError: tensors are missing, of the wrong shape, left over, or not finite.
    """
    dtype = _dtype_name(dtype)
    if "quantization_config" in source.config:
        method = (source.config["quantization_config"] or {}).get("quant_method", "an unnamed method")
        raise CheckpointError(
            source.path, f"is already quantized (by {method}): give the float checkpoint it was made from."
        )
    leaves, structure = jax.tree_util.tree_flatten_with_path(architecture.abstract_params())
    tensors = [architecture.tensor_name(tuple(map(_key, path))) for path, _ in leaves]
    expected = {}
    for (name, transposed), (_, leaf) in zip(tensors, leaves, strict=True):
        expected[name] = leaf.shape[::-1] if transposed else leaf.shape
    _check(source, expected)
    arrays = []
    for (name, transposed), (path, leaf) in zip(tensors, leaves, strict=True):
        where = placement(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        arrays.append(jax.device_put(_read(source, name, transposed, dtype), where))
    return jax.tree_util.tree_unflatten(structure, arrays)


def _dtype_name(dtype: DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in PARAM_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use {' or '.join(PARAM_DTYPES)}.")
    return name


def _key(entry: Any) -> str | int:
    return entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key


def _check(source: TensorSource, expected: dict[str, tuple[int, ...]]) -> None:
    """Collect everything that is wrong before any tensor is read."""
    stored = set(source.names())
    problems = []
    for name, shape in expected.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        elif source.shape(name) != shape:
            problems.append(f"{name} has shape {source.shape(name)}, not {shape}")
    left_over = sorted(name for name in stored - set(expected) if not COMPUTED.search(name))
    if OUTPUT in left_over and EMBEDDING in expected:
        # The config ties the head to the embedding: a stored copy may be dropped, another matrix may not.
        left_over.remove(OUTPUT)
        if not _equal(source, OUTPUT, EMBEDDING):
            problems.append(f"{OUTPUT} differs from {EMBEDDING} though the config ties them")
    problems += [f"{name} belongs to no part of this architecture" for name in left_over]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(source.path, f"does not fit its config: {shown}.")


def _equal(source: TensorSource, one: str, other: str) -> bool:
    return source.shape(one) == source.shape(other) and np.array_equal(source.tensor(one), source.tensor(other))


def _read(source: TensorSource, name: str, transposed: bool, dtype: str) -> Float[np.ndarray, "..."]:
    values = source.tensor(name)
    if not np.isfinite(values).all():
        raise CheckpointError(source.path, f"tensor {name!r} holds NaN or infinity.")
    return np.ascontiguousarray(values.T if transposed else values, dtype=jnp.dtype(dtype))


def _download(model_id: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        # Files in folders, and "consolidated" ones, are the same weights in another layout.
        return snapshot_download(model_id, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
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
