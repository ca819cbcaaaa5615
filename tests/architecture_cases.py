"""Tiny models of every family with weights made from a seed, shared by the oracle script and the tests.

A case is what its oracle file says: the config and the names and shapes of the tensors as transformers saved them.
A new architecture is a row in CONFIGS, and a run of tests/oracles/make_architecture_oracles.py.
"""

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ORACLES = Path(__file__).parent / "oracles" / "architectures"
BATCH, TIME, PADDING = 2, 20, 5
DOCUMENTED = "stablelm"  # not a family of the library: docs/adding_a_model.md has its table

_TOKENS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
_QWEN_MOE = {**_GROUPED, "moe_intermediate_size": 16, "head_dim": 12}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
_OPT = {"model_type": "opt", **_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}
_GPT = {
    **_TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
}
_NEOX = {"model_type": "gpt_neox", **_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 7.0],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **_GROUPED},
    "qwen2_window": {"model_type": "qwen2", **_GROUPED, **_WINDOW, "num_hidden_layers": 3, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_window": {"model_type": "qwen3", **_GROUPED, **_WINDOW, "head_dim": 12, "attention_bias": True},
    "gemma": {"model_type": "gemma", **_GROUPED, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "num_hidden_layers": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "mixtral": {"model_type": "mixtral", **_GROUPED, "num_local_experts": 4},
    "qwen3moe": {"model_type": "qwen3_moe", **_QWEN_MOE, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen3moe_mixed": {
        "model_type": "qwen3_moe",
        **_QWEN_MOE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", **_GROUPED, "sliding_window": 6},
    "phi3_long": {
        "model_type": "phi3",
        **_GROUPED,
        "original_max_position_embeddings": 16,
        "rope_parameters": _LONGROPE,
    },
    "phi3_short": {
        "model_type": "phi3",
        **_GROUPED,
        "original_max_position_embeddings": 256,
        "rope_parameters": _LONGROPE,
        "tie_word_embeddings": True,
    },
    "opt": _OPT,
    "opt_350m": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "opt_without_biases": {**_OPT, "enable_bias": False, "activation_function": "gelu"},
    "gpt2": {"model_type": "gpt2", **_GPT},
    "gpt2_scaled": {"model_type": "gpt2", **_GPT, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    "gpt_neo": {
        "model_type": "gpt_neo",
        **_TOKENS,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
    },
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5},
    "gpt_neox_sequential": {**_NEOX, "rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
    "gptj": {"model_type": "gptj", **_GPT, "rotary_dim": 4},
    DOCUMENTED: {"model_type": "stablelm", **_GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "bloom": {"model_type": "bloom", **_TOKENS, "hidden_size": 36, "n_layer": 2, "n_head": 6},
}


def tokens(name: str) -> np.ndarray:
    """The case's input, [BATCH, TIME]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.integers(3, 48, (BATCH, TIME), dtype=np.int32)  # not those of padding and ends


def mask() -> np.ndarray:
    """The first sequence of the padded input begins with PADDING tokens that are none."""
    real = np.ones((BATCH, TIME), bool)
    real[0, :PADDING] = False
    return real


def positions() -> np.ndarray:
    """Of the padded input: each sequence's first real token is at 0."""
    return np.maximum(np.cumsum(mask(), axis=1) - 1, 0).astype(np.int32)


@lru_cache
def oracle(name: str) -> dict[str, Any]:
    """The committed oracle of a case: config, shapes of the tensors by name, logits, logits of the padded input."""
    found = json.loads((ORACLES / f"{name}.json").read_text())
    with np.load(ORACLES / "logits.npz") as arrays:
        return {**found, "logits": arrays[name], "padded": arrays[f"{name}.padded"]}


def tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Float32 weights by name; those of norms and biases are not what training begins with."""
    return {name: _random(name, tuple(shape)) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        values /= 1.0 if any(part in name for part in ("embed", "wte", "wpe")) else np.sqrt(shape[-1])
    else:
        values *= 0.3
        if name.endswith(".weight"):
            values += 1
    return values.astype(np.float32)


def write_checkpoint(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """A directory as Hugging Face has it, with the case's weights."""
    from safetensors.numpy import save_file

    save_file(tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
