"""OPT: learned positions from the third row on; opt-350m has its norms after, and a narrower embedding."""

from typing import Any

from gptq_jax.models.families.base import Family, Fields
from gptq_jax.models.names import Names

_NAMES = Names(
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    output="self_attn.out_proj",
    up="fc1",
    down="fc2",
)


def _opt(fields: Fields) -> dict[str, Any]:
    before = fields["do_layer_norm_before"]
    width = fields.get("word_embed_proj_dim")
    return {
        "residual": "sequential" if before else "post",
        "final_norm": before and not fields["_remove_final_layer_norm"],
        "embedding_size": width if width != fields["hidden_size"] else None,
        "attention_bias": fields["enable_bias"],
        "mlp_bias": fields["enable_bias"],
    }


OPT = Family(
    renamed={"intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
    defaults={
        "max_position_embeddings": 2048,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
    },
    fixed={"rms_norm_eps": 1e-5, "sliding_window": None, "num_key_value_heads": None, "head_dim": None},
    only={"layer_norm_elementwise_affine": True},
    kinds={
        "do_layer_norm_before": bool,
        "_remove_final_layer_norm": bool,
        "enable_bias": bool,
        "word_embed_proj_dim": int,
    },
    structure={"norm": "layer", "mlp": "plain", "rope": None, "position_offset": 2, "names": _NAMES},
    derive=_opt,
)
