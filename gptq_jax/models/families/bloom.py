"""BLOOM: ALiBi in place of positions, a norm on embedded tokens, one layer for q, k and v."""

import math
from typing import Any

from gptq_jax.models.attention import Scores
from gptq_jax.models.families.base import Family, Fields
from gptq_jax.models.names import Names


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head (Press et al. 2021, arXiv:2108.12409): 2**(-8 i / heads) for i from 1.

    Where `heads` is no power of two: those of the power below, then every second one of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * index / below) for index in range(1, below + 1)]
    between = [2.0 ** (-4 * index / below) for index in range(1, 2 * below + 1, 2)]
    return tuple(first + between[: heads - below])


def _alibi(fields: Fields) -> dict[str, Any]:
    return {"scores": Scores(slopes=alibi_slopes(fields["num_attention_heads"]))}


BLOOM = Family(
    renamed={
        "hidden_size": ("n_embed",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "max_position_embeddings": ("seq_length",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    fixed={
        "intermediate_size": None,
        "hidden_act": "gelu_new",
        "sliding_window": None,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    only={"apply_residual_connection_post_layernorm": False},
    mlp_ratio=4,
    structure={
        "norm": "layer",
        "mlp": "plain",
        "qkv": "per_head",
        "rope": None,
        "embedding_norm": True,
        "names": Names(
            blocks="transformer.h",
            embedding="transformer.word_embeddings",
            embedding_norm="transformer.word_embeddings_layernorm",
            final_norm="transformer.ln_f",
            qkv="self_attention.query_key_value",
            output="self_attention.dense",
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
        ),
    },
    derive=_alibi,
)
