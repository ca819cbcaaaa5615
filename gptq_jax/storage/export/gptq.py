"""Hugging Face's GPTQ format, as GPTQModel, transformers and vLLM load it."""

import re
from functools import partial
from importlib.metadata import version as package_version
from typing import Any

from gptq_jax.models.base import Model
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.export.base import (
    Modules,
    Plan,
    encode_all,
    grid_of,
    modules,
    most_common_spec,
    packed_bytes,
    refuse,
)
from gptq_jax.storage.packed.gptq import encode

HEAD = "lm_head"


def plan(model: Model, dtype: str, *, version: str) -> Plan:
    """Packed modules as qweight, qzeros, scales and g_idx; the rest in `dtype`.

    Args:
        model: quantized.
        dtype: of what is not.
        version: "gptq" (zero points stored minus one) or "gptq_v2".

    Raises:
        ValueError: the model is not quantized, or naming every module that the format cannot hold.
    """
    found = modules(model)
    common = most_common_spec(found.packed)
    if version == "gptq":
        # GPTQModel refuses these from any writer but itself: old ones stored some zero points wrong.
        remedy = "has zero points of its own, which loaders distrust in v1: use --format gptq_v2"
        refuse([f"{name} {remedy}" for name, tensor in found.packed.items() if not tensor.spec.symmetric])
    packed = encode_all(found.packed, partial(encode, version=version))
    config = quantization_config(found, common, version, (model.report or {}).get("settings", {}))

    def tensors() -> Any:
        yield from found.float_tensors(dtype)
        yield from packed()

    return Plan(tensors, config, packed_bytes(found, dtype), {"quantize_config.json": config})


def quantization_config(found: Modules, common: QuantSpec, version: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The object that config.json and quantize_config.json both hold; `dynamic` says what is not on `common`."""
    dynamic: dict[str, dict[str, Any]] = {}
    for name, tensor in found.packed.items():
        if (spec := grid_of(tensor)) != common:
            dynamic[f"+:^{re.escape(name)}$"] = _grid(spec)
    for name in found.float_linears:
        dynamic[f"-:^{re.escape(name)}$"] = {}
    return {
        "quant_method": "gptq",
        **_grid(common),
        "desc_act": any(tensor.group_of_row is not None for tensor in found.packed.values()),
        "checkpoint_format": version,
        "lm_head": HEAD in found.packed,
        "pack_dtype": "int32",
        "damp_percent": settings.get("damping", 0.01),
        "static_groups": bool(settings.get("static_groups", False)),
        "true_sequential": bool(settings.get("true_sequential", True)),
        "meta": {"quantizer": [f"gptq-jax:{package_version('gptq-jax')}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}
