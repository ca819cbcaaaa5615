"""Phi-3 and Phi-4-mini: Llama's blocks with one layer for q, k and v, and one for gate and up."""

from gptq_jax.models.families.base import Family

PHI3 = Family(
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    fixed={"attention_bias": False, "mlp_bias": False},
    partial_rotary=True,
    rope_kinds={"su": "longrope", "yarn": "longrope"},
    structure={"qkv": "concatenated", "mlp": "fused"},
)
