"""Qwen 2, 2.5 and 3, dense: Llama's blocks with biases in q, k and v, or with norms of queries and keys."""

from typing import Any

from gptq_jax.models.families.base import Family, Fields, by_layer_type


def windows(fields: Fields) -> dict[str, Any]:
    """Layers from `max_window_layers` on have the window, if it is used at all."""
    if not fields["use_sliding_window"] or fields["sliding_window"] is None:
        return {"sliding_window": None}
    layers, first = fields["num_hidden_layers"], fields["max_window_layers"]
    types = fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return by_layer_type(types, full_attention={"sliding_window": None}, sliding_attention={})


_KINDS = {"use_sliding_window": bool, "max_window_layers": int, "layer_types": list}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Family(
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, **_WINDOW},
    fixed={"attention_bias": True, "mlp_bias": False},
    kinds=_KINDS,
    structure={"output_bias": False},
    derive=windows,
)
QWEN3 = Family(
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, **_WINDOW},
    fixed={"mlp_bias": False},
    kinds=_KINDS,
    structure={"qk_norm": True},
    derive=windows,
)
