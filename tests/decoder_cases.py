"""Tiny decoders with weights made from a seed, shared by the oracle script and the tests."""

import zlib

import numpy as np

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, dict] = {
    "tied_gqa": _LLAMA,
    "untied_mha": {**_LLAMA, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama3_rope": {**_LLAMA, "rope_parameters": _LLAMA3_ROPE},
    "linear_rope": {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "yarn_rope": {**_LLAMA, "rope_parameters": _YARN_ROPE},
    "head_dim": {**_LLAMA, "head_dim": 20, "tie_word_embeddings": False},
    "mistral_window": {**_LLAMA, "model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False},
    "mistral_full": {**_LLAMA, "model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
}
BATCH, TIME = 2, 32


def tokens(name: str) -> np.ndarray:
    """The case's input, [BATCH, TIME]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(0, CASES[name]["vocab_size"], (BATCH, TIME), dtype=np.int32)


def tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face's names and shapes (a linear layer's is [outputs, inputs])."""
    d_model, d_ff = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or d_model // config["num_attention_heads"]
    d_query, d_key = (head_dim * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    linear = {
        "self_attn.q_proj": (d_query, d_model),
        "self_attn.k_proj": (d_key, d_model),
        "self_attn.v_proj": (d_key, d_model),
        "self_attn.o_proj": (d_model, d_query),
        "mlp.gate_proj": (d_ff, d_model),
        "mlp.up_proj": (d_ff, d_model),
        "mlp.down_proj": (d_model, d_ff),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d_model)}
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        for path, shape in linear.items():
            shapes[f"{block}.{path}.weight"] = shape
            if config.get("attention_bias" if path.startswith("self_attn") else "mlp_bias"):
                shapes[f"{block}.{path}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{norm}.weight"] = (d_model,)
    shapes["model.norm.weight"] = (d_model,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d_model)
    return {name: _random(name, shape, seed) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 2:
        values /= 1.0 if "embed" in name else np.sqrt(shape[1])
    elif name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    return values.astype(np.float32)
