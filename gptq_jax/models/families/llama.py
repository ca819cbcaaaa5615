"""Llama 1/2/3 and SmolLM2, and Mistral."""

from gptq_jax.models.families.base import Family

LLAMA = Family(
    defaults={"max_position_embeddings": 2048},
    fixed={"sliding_window": None},
)
MISTRAL = Family(
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    fixed={"attention_bias": False, "mlp_bias": False},
)
