"""GPT-2 and GPT-Neo: learned positions; GPT-2 has one layer for q, k and v, GPT-Neo local and global attention."""

from typing import Any

from gptq_jax.models.attention import Scores
from gptq_jax.models.families.base import Family, Fields, by_layer_type
from gptq_jax.models.names import Names

RENAMED = {  # GPT-J has them too
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "intermediate_size": ("n_inner",),
    "hidden_act": ("activation_function",),
    "rms_norm_eps": ("layer_norm_epsilon",),
}
_NAMES = {
    "blocks": "transformer.h",
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_DEFAULTS = {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_FIXED = {"sliding_window": None, "num_key_value_heads": None, "head_dim": None, "mlp_bias": True}
_STRUCTURE = {"norm": "layer", "mlp": "plain", "rope": None, "position_offset": 0}


def _gpt2(fields: Fields) -> dict[str, Any]:
    """Scores may be scaled layer by layer, each of which is then a kind of its own."""
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    scale = (fields["hidden_size"] // heads) ** -0.5 if fields["scale_attn_weights"] else 1.0
    if not fields["scale_attn_by_inverse_layer_idx"]:
        return {"scores": Scores(scale=scale)}
    kinds = {f"layer {index}": {"scores": Scores(scale=scale / (index + 1))} for index in range(layers)}
    return by_layer_type(list(kinds), **kinds)


def _gpt_neo(fields: Fields) -> dict[str, Any]:
    """`attention_types` is like [[["global", "local"], 12]]: what is repeated, and how often."""
    layers = fields["num_hidden_layers"]
    try:
        types = [kind for kinds, times in fields["attention_types"] for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        shown = f"{fields['attention_types']!r:.60}"
        raise ValueError(f"attention_types={shown} is not a list of [[kinds], times].") from None
    if len(types) != layers:
        raise ValueError(f"attention_types names {len(types)} layers, but num_layers is {layers}.")
    return by_layer_type(types, **{"global": {"sliding_window": None}, "local": {}})


GPT2 = Family(
    renamed=RENAMED,
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 1024,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    fixed={**_FIXED, "attention_bias": True},
    only={"add_cross_attention": False},
    kinds={"scale_attn_weights": bool, "scale_attn_by_inverse_layer_idx": bool},
    mlp_ratio=4,
    structure={
        **_STRUCTURE,
        "qkv": "concatenated",
        "transposed": False,
        "names": Names(**_NAMES, qkv="attn.c_attn", output="attn.c_proj"),
    },
    derive=_gpt2,
)
GPT_NEO = Family(
    renamed={
        "num_hidden_layers": ("num_layers",),
        "num_attention_heads": ("num_heads",),
        "hidden_act": ("activation_function",),
        "rms_norm_eps": ("layer_norm_epsilon",),
        "sliding_window": ("window_size",),
    },
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 2048,
        "sliding_window": 256,
        "attention_types": [[["global", "local"], 12]],
    },
    fixed={name: value for name, value in _FIXED.items() if name != "sliding_window"} | {"attention_bias": False},
    kinds={"attention_types": list},
    mlp_ratio=4,
    structure={
        **_STRUCTURE,
        "output_bias": True,
        "scores": Scores(scale=1.0),
        "names": Names(
            **_NAMES,
            query="attn.attention.q_proj",
            key="attn.attention.k_proj",
            value="attn.attention.v_proj",
            output="attn.attention.out_proj",
        ),
    },
    derive=_gpt_neo,
)
