"""GPT-NeoX and Pythia: attention and MLP side by side, a part of each head rotated, one layer for q, k and v."""

from typing import Any

from gptq_jax.models.families.base import Family, Fields
from gptq_jax.models.names import Names


def _residual(fields: Fields) -> dict[str, Any]:
    return {"residual": "parallel" if fields["use_parallel_residual"] else "sequential"}


GPT_NEOX = Family(
    renamed={
        "rms_norm_eps": ("layer_norm_eps",),
        "rope_theta": ("rotary_emb_base",),
        "partial_rotary_factor": ("rotary_pct",),
    },
    defaults={
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    fixed={"sliding_window": None, "num_key_value_heads": None, "head_dim": None, "mlp_bias": True},
    kinds={"use_parallel_residual": bool},
    partial_rotary=True,
    structure={
        "norm": "layer",
        "mlp": "plain",
        "qkv": "per_head",
        "names": Names(
            blocks="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            head="embed_out",
            qkv="attention.query_key_value",
            output="attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    },
    derive=_residual,
)
