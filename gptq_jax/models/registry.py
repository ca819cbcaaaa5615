"""Which Hugging Face configs are supported, and how each family reads its fields, as data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gptq_jax.models.base import Architecture
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.experts import MIXTRAL_NAMES, QWEN_NAMES, Experts
from gptq_jax.models.rope import SCALINGS, Rope


@dataclass(frozen=True)
class Family:
    """How a `model_type` reads its config.

    Attributes:
        defaults: values of fields a config file leaves out, as transformers has them.
        fixed: fields this family does not read, whatever a config file says.
        qk_norm: heads of queries and keys are normalized.
        experts: (the fields) -> its sparse MLPs.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: bool = False
    experts: Callable[[Mapping[str, Any]], Experts | None] | None = None


def _mixtral_experts(fields: Mapping[str, Any]) -> Experts:
    return Experts(
        count=fields["num_local_experts"],
        top_k=fields["num_experts_per_tok"],
        intermediate_size=fields["intermediate_size"],
        names=MIXTRAL_NAMES,
    )


def _qwen3_experts(fields: Mapping[str, Any]) -> Experts | None:
    count, step = fields.get("num_experts", fields.get("num_local_experts", 128)), fields["decoder_sparse_step"]
    if count == 0:
        return None
    if step < 1:
        raise ValueError(f"decoder_sparse_step={step} must be positive.")
    named = fields.get("mlp_only_layers") or []
    if not all(_is(index, int) for index in named):
        raise ValueError(f"mlp_only_layers={named!r:.60} is no list of layers.")
    layers = range(fields["num_hidden_layers"])
    return Experts(
        count=count,
        top_k=fields["num_experts_per_tok"],
        intermediate_size=fields["moe_intermediate_size"],
        normalize=fields["norm_topk_prob"],
        names=QWEN_NAMES,
        dense_layers=tuple(index for index in layers if index in named or (index + 1) % step),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            defaults={"max_position_embeddings": 2048},
            fixed={"sliding_window": None},
        ),
        "mistral": Family(
            defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            fixed={"attention_bias": False, "mlp_bias": False},
        ),
        "mixtral": Family(
            defaults={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": None,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            fixed={"attention_bias": False, "mlp_bias": False},
            experts=_mixtral_experts,
        ),
        "qwen3_moe": Family(
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "decoder_sparse_step": 1,
                "moe_intermediate_size": 768,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            fixed={"mlp_bias": False},
            qk_norm=True,
            experts=_qwen3_experts,
        ),
    }
)
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_KINDS = {  # of the fields that are read, where they are not null
    int: (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "decoder_sparse_step",
    ),
    float: ("rms_norm_eps", "rope_theta", "partial_rotary_factor"),
    bool: ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"),
    list: ("mlp_only_layers",),
    str: ("hidden_act",),
    dict: ("rope_scaling", "rope_parameters"),
}
_KIND_NAMES = {
    int: "an integer below 2**31",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}
_NULLABLE = ("sliding_window", "num_key_value_heads", "head_dim")  # null is not the same as absent
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def architecture_from_config(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config describes.

    Args:
        hf_config: the content of config.json, old or new style (`rope_scaling` or `rope_parameters`).

    Raises:
        ValueError: the model type, or a feature it asks for, is not supported, or a field is missing or of
            another type.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: use one of {sorted(FAMILIES)}.")
    family = FAMILIES[model_type]
    stated = {name: value for name, value in hf_config.items() if value is not None or name in _NULLABLE}
    fields = {**_DEFAULTS, **family.defaults, **stated, **family.fixed}
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise ValueError(f"the config of this {model_type} model lacks {', '.join(missing)}.")
    _check_kinds(fields)
    for name in (*_REQUIRED, "max_position_embeddings", "rms_norm_eps"):
        if not fields[name] > 0:
            raise ValueError(f"{name}={fields[name]} must be positive.")
    heads = fields["num_attention_heads"]
    if not fields.get("head_dim") and fields["hidden_size"] % heads:
        raise ValueError(f"hidden_size={fields['hidden_size']} is no multiple of num_attention_heads={heads}.")
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        context_length=fields["max_position_embeddings"],
        rope=_rope(fields),
        rms_norm_eps=fields["rms_norm_eps"],
        hidden_act=fields["hidden_act"],
        attention_bias=fields["attention_bias"],
        mlp_bias=fields["mlp_bias"],
        sliding_window=fields["sliding_window"] if fields.get("use_sliding_window", True) else None,
        tie_embeddings=fields["tie_word_embeddings"],
        qk_norm=family.qk_norm,
        experts=None if family.experts is None else family.experts(fields),
    )


def _check_kinds(fields: Mapping[str, Any]) -> None:
    """Raise ValueError naming every field of another type than it should be, or a number beyond all bounds."""
    wrong = []
    for kind, names in _KINDS.items():
        for name in names:
            value = fields.get(name)
            if value is not None and not _is(value, kind):
                wrong.append(f"{name}={value!r:.60} is not {_KIND_NAMES[kind]}")
    if wrong:
        raise ValueError(f"the config cannot be read: {'; '.join(wrong)}.")


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and abs(value) < 2**31
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
    return type(value) is kind


def _rope(fields: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps all in `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    found = {
        "rope_theta": fields.get("rope_theta"),
        "partial_rotary_factor": fields.get("partial_rotary_factor"),
        **(fields.get("rope_scaling") or {}),
        **(fields.get("rope_parameters") or {}),
    }
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope_type={kind!r:.60} is not a string.")
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (number or name in ("rope_theta", "partial_rotary_factor")) and value is not None and not _is(value, float):
            raise ValueError(f"{name}={value!r:.60} is not {_KIND_NAMES[float]}.")
    if (found["partial_rotary_factor"] or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={found['partial_rotary_factor']} is not supported: only 1.0 is.")
    if kind in SCALINGS and "original_max_position_embeddings" in SCALINGS[kind].needs:
        # Where it is left out, transformers takes the context the config states.
        found["original_max_position_embeddings"] = (
            found.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        )
    settings = {
        name: float(value)
        for name, value in found.items()
        if name not in ("rope_theta", "partial_rotary_factor") and isinstance(value, int | float)
    }
    return Rope(theta=float(found["rope_theta"] or 10000.0), kind=kind, settings=tuple(sorted(settings.items())))
