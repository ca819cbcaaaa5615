"""GPT-J: attention and MLP side by side behind one norm, neighbours in a head rotated, a head with a bias."""

from typing import Any

from gptq_jax.models.families.base import Family, Fields
from gptq_jax.models.families.gpt2 import RENAMED
from gptq_jax.models.names import Names
from gptq_jax.models.rope import Rope


def _rotation(fields: Fields) -> dict[str, Any]:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    if not 0 < fields["rotary_dim"] <= head_dim:
        raise ValueError(f"rotary_dim={fields['rotary_dim']} must be positive and at most the {head_dim} of a head.")
    return {"rope": Rope(partial=fields["rotary_dim"] / head_dim, interleaved=True)}


GPTJ = Family(
    renamed=RENAMED,
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "rotary_dim": 64},
    fixed={
        "sliding_window": None,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": True,
    },
    only={"tie_word_embeddings": False},
    kinds={"rotary_dim": int},
    mlp_ratio=4,
    structure={
        "norm": "layer",
        "mlp": "plain",
        "residual": "parallel_one_norm",
        "head_bias": True,
        "names": Names(
            blocks="transformer.h",
            embedding="transformer.wte",
            final_norm="transformer.ln_f",
            attention_norm="ln_1",
            query="attn.q_proj",
            key="attn.k_proj",
            value="attn.v_proj",
            output="attn.out_proj",
            up="mlp.fc_in",
            down="mlp.fc_out",
        ),
    },
    derive=_rotation,
)
