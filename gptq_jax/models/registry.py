"""Which Hugging Face configs are supported, and how each family reads its fields, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gptq_jax.models.base import Architecture
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.rope import SCALINGS, Rope


@dataclass(frozen=True)
class Family:
    """How a `model_type` reads its config.

    Attributes:
        defaults: values of fields a config file leaves out, as transformers has them.
        fixed: fields this family does not read, whatever a config file says.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


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
    }
)
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def architecture_from_config(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config describes.

    Args:
        hf_config: the content of config.json, old or new style (`rope_scaling` or `rope_parameters`).

    Raises:
        ValueError: the model type, or a feature it asks for, is not supported, or a field is missing.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: use one of {sorted(FAMILIES)}.")
    family = FAMILIES[model_type]
    fields = {**_DEFAULTS, **family.defaults, **hf_config, **family.fixed}
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise ValueError(f"the config of this {model_type} model lacks {', '.join(missing)}.")
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
        sliding_window=fields["sliding_window"],
        tie_embeddings=fields["tie_word_embeddings"],
    )


def _rope(fields: Mapping[str, Any]) -> Rope:
    """transformers 5 keeps all in `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    found = {
        "rope_theta": fields.get("rope_theta"),
        "partial_rotary_factor": fields.get("partial_rotary_factor"),
        **(fields.get("rope_scaling") or {}),
        **(fields.get("rope_parameters") or {}),
    }
    if (found["partial_rotary_factor"] or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={found['partial_rotary_factor']} is not supported: only 1.0 is.")
    kind = found.get("rope_type") or found.get("type") or "default"
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
