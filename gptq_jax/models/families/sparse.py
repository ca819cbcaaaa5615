"""Mixtral and Qwen3-MoE: Mistral's and Qwen3's blocks with experts in place of an MLP."""

from typing import Any

from gptq_jax.models.experts import Experts
from gptq_jax.models.families.base import Family, Fields, by_layer_type
from gptq_jax.models.names import Names


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "experts": Experts(
            count=fields["num_local_experts"],
            top_k=fields["num_experts_per_tok"],
            intermediate_size=fields["intermediate_size"],
        )
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    """Blocks are sparse but for those that are named, and of the others every `decoder_sparse_step`-th."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    step, dense = fields["decoder_sparse_step"], fields.get("mlp_only_layers") or []
    if step < 1:
        raise ValueError(f"decoder_sparse_step={step} must be positive.")
    if not all(type(index) is int for index in dense):
        raise ValueError(f"mlp_only_layers={dense!r:.60} is no list of layers.")
    # transformers 5 calls it what Mixtral does.
    count = fields.get("num_experts", fields.get("num_local_experts", 128))
    types = [
        "sparse" if count and index not in dense and (index + 1) % step == 0 else "dense"
        for index in range(fields["num_hidden_layers"])
    ]
    experts = None
    if "sparse" in types:
        experts = Experts(
            count=count,
            top_k=fields["num_experts_per_tok"],
            intermediate_size=fields["moe_intermediate_size"],
            normalize=fields["norm_topk_prob"],
        )
    kinds = by_layer_type(types, sparse={"experts": experts}, dense={"experts": None})
    return {"sliding_window": window, "experts": experts, **kinds}


MIXTRAL = Family(
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    fixed={"attention_bias": False, "mlp_bias": False},
    kinds={"num_local_experts": int, "num_experts_per_tok": int},
    structure={
        "names": Names(
            router="block_sparse_moe.gate",
            expert_gate="block_sparse_moe.experts.w1",
            expert_up="block_sparse_moe.experts.w3",
            expert_down="block_sparse_moe.experts.w2",
        )
    },
    derive=_mixtral,
)
QWEN3_MOE = Family(
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    fixed={"mlp_bias": False},
    kinds={
        **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), int),
        **dict.fromkeys(("use_sliding_window", "norm_topk_prob"), bool),
        "decoder_sparse_step": int,
        "mlp_only_layers": list,
    },
    structure={"qk_norm": True},
    derive=_qwen3_moe,
)
