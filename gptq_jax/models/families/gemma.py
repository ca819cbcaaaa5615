"""Gemma 1, 2 and 3: scaled embeddings, norms stored as scale - 1, and from Gemma 2 on norms on both sides."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptq_jax.models.attention import Scores
from gptq_jax.models.families.base import Family, Fields, by_layer_type, read_rope
from gptq_jax.models.names import Names
from gptq_jax.models.rope import Rope

_SANDWICH = Names(mlp_norm="pre_feedforward_layernorm")
_LEGACY = {"gelu": "gelu_pytorch_tanh"}  # what early configs say, and what they mean
_SHARED = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
_KINDS = {
    "query_pre_attn_scalar": float,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "layer_types": list,
    "rope_local_base_freq": float,
    "sliding_window_pattern": int,
}


def _gemma(fields: Fields) -> dict[str, Any]:
    act = fields["hidden_act"]
    return {"hidden_act": _LEGACY.get(act, act), "embedding_scale": float(fields["hidden_size"]) ** 0.5}


def _capped(fields: Fields) -> dict[str, Any]:
    if not (scalar := fields["query_pre_attn_scalar"]) > 0:
        raise ValueError(f"query_pre_attn_scalar={scalar} must be positive.")
    scores = Scores(scale=float(scalar) ** -0.5, softcap=_cap(fields, "attn_logit_softcapping"))
    return {**_gemma(fields), "scores": scores, "logit_softcap": _cap(fields, "final_logit_softcapping")}


def _gemma2(fields: Fields) -> dict[str, Any]:
    types = fields.get("layer_types") or _alternating(fields["num_hidden_layers"], 2)
    return _capped(fields) | by_layer_type(types, full_attention={"sliding_window": None}, sliding_attention={})


def _gemma3(fields: Fields) -> dict[str, Any]:
    """Local layers have the window and a rotation of their own."""
    types = fields.get("layer_types") or _alternating(fields["num_hidden_layers"], fields["sliding_window_pattern"])
    by_type: Mapping[str, Any] = fields.get("rope_parameters") or {}
    older = {
        "sliding_attention": {"rope_theta": fields["rope_local_base_freq"]},
        "full_attention": fields.get("rope_scaling") or {},
    }

    def rope(name: str) -> Rope:
        own = by_type.get(name) or {}
        if not isinstance(own, dict):
            raise ValueError(f"rope_parameters.{name}={own!r:.60} is not an object.")
        return read_rope(GEMMA3, {**fields, "rope_parameters": {**older[name], **own}, "rope_scaling": None})

    return {**_capped(fields), "rope": rope("full_attention")} | by_layer_type(
        types,
        full_attention={"sliding_window": None},
        sliding_attention={"rope": rope("sliding_attention")},
    )


def _alternating(layers: int, every: int) -> list[str]:
    """One layer in `every` sees everything."""
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)]


def _cap(fields: Fields, name: str) -> float | None:
    value = fields.get(name)
    if value is not None and not value > 0:
        raise ValueError(f"{name}={value} must be positive, or null.")
    return None if value is None else float(value)


GEMMA = Family(
    defaults={**_SHARED, "max_position_embeddings": 8192, "num_key_value_heads": 16},
    fixed={"sliding_window": None, "mlp_bias": False},
    only={"use_bidirectional_attention": False},
    structure={"norm": "rms_plus_one"},
    derive=_gemma,
)
GEMMA2 = Family(
    renamed={"hidden_act": ("hidden_activation",)},
    defaults={
        **_SHARED,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={"mlp_bias": False},
    only={"use_bidirectional_attention": False},
    kinds=_KINDS,
    structure={"norm": "rms_plus_one", "residual": "sandwich", "names": _SANDWICH},
    derive=_gemma2,
)
GEMMA3 = Family(
    renamed={"hidden_act": ("hidden_activation",)},
    defaults={
        **_SHARED,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    fixed={"mlp_bias": False},
    only={"use_bidirectional_attention": False},
    kinds=_KINDS,
    structure={"norm": "rms_plus_one", "residual": "sandwich", "qk_norm": True, "names": _SANDWICH},
    derive=_gemma3,
)
# With its vision tower left out.
GEMMA3_OF_SEVERAL = replace(GEMMA3, inner="text_config")
