"""LoRA adapters as the PEFT library stores them: adapter_config.json and adapter_model.safetensors.

PEFT's `lora_A` is our `a` transposed, [rank, d_in], and `lora_B` our `b` transposed, [d_out, rank]; modules have
Hugging Face's names. So adapters trained here load beside an export of the model, and PEFT's beside a model here.
"""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float
from safetensors.numpy import save_file

from gptq_jax.hooks.low_rank import LowRank
from gptq_jax.models.base import Architecture, Model, linear_paths
from gptq_jax.models.lora import Adapters, with_lora
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.directory import EXPORT_MARK, check_target, replacing, write_json
from gptq_jax.storage.fields import Fields, raise_problems
from gptq_jax.storage.hf_directory import read_config
from gptq_jax.storage.safetensors_header import StoredTensor, read_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}


def save_lora(
    adapters: Mapping[str, LowRank], model: Model, path: str | PathLike[str], *, overwrite: bool = False
) -> None:
    """Write adapters to a directory, atomically, in PEFT's format.

    Args:
        adapters: of `lora`, or trained from them.
        model: that they are for.
        path: of the directory; its parent must exist.
        overwrite: replace a directory this function wrote before.

    Raises:
        ValueError: there are none, they are of several ranks or scales, or do not fit the model.
        OSError: see `gptq_jax.storage.directory.check_target`.
    """
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to save.")
    with_lora(model, adapters)
    kinds = {(added.a.shape[1], added.scale) for added in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"adapters are of several ranks and scales, {sorted(kinds)}: save those of one kind together.")
    ((rank, scale),) = kinds
    path = Path(path).absolute()
    check_target(path, overwrite=overwrite, nbytes=sum(leaf.nbytes for leaf in jax.tree.leaves(dict(adapters))))
    modules = {_module(model.config, layer): added for layer, added in adapters.items()}
    with replacing(path) as partial:
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank * scale,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": not model.config.tensor_name(_leaf(next(iter(adapters))))[1],
            "target_modules": sorted(modules),
        }
        write_json(partial / CONFIG, config)
        tensors = {}
        for module, added in modules.items():
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(np.asarray(added.a).T)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(np.asarray(added.b).T)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        write_json(partial / EXPORT_MARK, {"format": "peft"})


def load_lora(path: str | PathLike[str], model: Model, *, dtype: DTypeLike = jnp.float32) -> Adapters:
    """Read adapters that `save_lora` or PEFT wrote.

    Args:
        path: of the directory.
        model: that they are for.
        dtype: of the adapters.

    Raises:
        CheckpointError: a file is missing or damaged, the adapters are of another kind than LoRA's own, or a layer
            of theirs is not in the model or has another shape.
    """
    path = Path(path)
    scale, rank = _read_kind(path / CONFIG)
    stored = read_header(path / TENSORS)
    by_module = {_module(model.config, layer): layer for layer in _layers(model)}
    found: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in by_module:
            problems.append(f"tensor {name!r} is no adapter of a layer of this model")
        elif len(tensor.shape) != 2 or tensor.shape[0 if match[2] == "A" else 1] != rank:
            problems.append(f"tensor {name!r} has shape {tensor.shape}, but r is {rank}")
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    problems += [f"{module} has lora_{next(iter(pair))} only" for module, pair in found.items() if len(pair) < 2]
    raise_problems(path / TENSORS, problems)
    if not found:
        raise CheckpointError(path / TENSORS, "holds no adapters.")
    adapters = {
        by_module[module]: LowRank(
            a=jnp.asarray(_read(pair["A"], f"{module}.lora_A"), dtype),
            b=jnp.asarray(_read(pair["B"], f"{module}.lora_B"), dtype),
            scale=scale,
        )
        for module, pair in found.items()
    }
    try:
        with_lora(model, adapters)
    except ValueError as error:
        raise CheckpointError(path / TENSORS, str(error)) from None
    return adapters


def _read_kind(file: Path) -> tuple[float, int]:
    """The scale and the rank of the adapters."""
    fields = Fields(file, read_config(file))
    if (kind := fields.get("peft_type", kind=str, default="LORA")) != "LORA":
        fields.problem("peft_type", f"is {kind!r}: only LORA is supported")
    for name, plain in _UNSUPPORTED.items():
        value = fields.content.get(name, plain)
        if value not in (plain, None, []):
            fields.problem(name, f"is {value!r:.60}: only plain LoRA is supported")
    rank = fields.get("r", kind=int, default=0)
    alpha: Any = fields.content.get("lora_alpha", 8)
    if rank < 1:
        fields.problem("r", "is not a positive number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        fields.problem("lora_alpha", f"is {alpha!r:.60}, not a positive number")
    fields.check()
    return alpha / (rank**0.5 if fields.get("use_rslora", kind=bool, default=False) else rank), rank


def _layers(model: Model) -> list[str]:
    return [
        f"layers.{index}.{path}"
        for index in range(model.config.num_layers)
        for path in linear_paths(model.config, model.config.layer_kind(index))
    ]


def _leaf(layer: str) -> tuple[str | int, ...]:
    names, index, inside = layer.split(".", 2)
    return (names, int(index), *inside.split("."), "kernel")


def _module(config: Architecture, layer: str) -> str:
    """Hugging Face's name of a layer."""
    return config.tensor_name(_leaf(layer))[0].removesuffix(".weight")


def _read(tensor: StoredTensor, name: str) -> Float[np.ndarray, "_ _"]:
    values = tensor.read(name).T.astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(tensor.file, f"{name} holds NaN or infinity.")
    return values
