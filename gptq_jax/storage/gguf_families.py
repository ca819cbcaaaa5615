"""What llama.cpp calls the parts of each family, and how it changes their values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gptq_jax.storage.gguf_keys import Keys

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
GEMMA_LOCAL_THETA, GEMMA_PATTERN = 10000.0, 6  # of Gemma 3, which older files take for granted


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """One architecture of GGUF.

    Attributes:
        model_type: Hugging Face's, where `config` gives no other.
        architecture: Hugging Face's name of the class.
        act: Hugging Face's name of the activation.
        blocks: parts of a block, and Hugging Face's names of them.
        permuted: rows of queries and keys have the members of a rotary pair side by side.
        norm_offset: what llama.cpp added to the weights of norms.
        partial_rotary: a part of each head may be rotated.
        config: (metadata, config so far) -> fields of Hugging Face's config that other families do not have.
    """

    model_type: str
    architecture: str
    act: str = "silu"
    blocks: Mapping[str, str] = field(default_factory=lambda: BLOCK)
    permuted: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False
    config: Callable[[Keys, Mapping[str, Any]], dict[str, Any]] = lambda keys, config: {}


def _llama(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp calls Mistral llama too."""
    window = keys.get("attention.sliding_window", int, None)
    if not window:
        return {}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _gemma2(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": keys.positive("attention.sliding_window", int),
        "query_pre_attn_scalar": _scalar(config, blocks_of_the_largest=46),
        "attn_logit_softcapping": keys.positive("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": keys.positive("final_logit_softcapping", float, 30.0),
    }


def _gemma3(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": keys.positive("attention.sliding_window", int),
        "sliding_window_pattern": keys.positive("attention.sliding_window_pattern", int, GEMMA_PATTERN),
        "query_pre_attn_scalar": _scalar(config, blocks_of_the_largest=62),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", float, None),
        "final_logit_softcapping": keys.get("final_logit_softcapping", float, None),
        "rope_local_base_freq": keys.positive("rope.freq_base_swa", float, GEMMA_LOCAL_THETA),
    }


def _scalar(config: Mapping[str, Any], *, blocks_of_the_largest: int) -> int:
    """No key says it: it is the width of a head, but in the largest model, which is known by its depth."""
    if config["num_hidden_layers"] == blocks_of_the_largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _phi3(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    original = keys.get("rope.scaling.original_context_length", int, config["max_position_embeddings"])
    return {
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window", int, None) or None,
    }


_GEMMA_ACT = "gelu_pytorch_tanh"

GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily(model_type="llama", architecture="LlamaForCausalLM", permuted=True, config=_llama),
        "qwen2": GgufFamily(model_type="qwen2", architecture="Qwen2ForCausalLM"),
        "qwen3": GgufFamily(model_type="qwen3", architecture="Qwen3ForCausalLM", blocks={**BLOCK, **_QK_NORMS}),
        "gemma": GgufFamily(model_type="gemma", architecture="GemmaForCausalLM", act=_GEMMA_ACT, norm_offset=1.0),
        "gemma2": GgufFamily(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            act=_GEMMA_ACT,
            blocks={**BLOCK, **_SANDWICH},
            norm_offset=1.0,
            config=_gemma2,
        ),
        "gemma3": GgufFamily(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            act=_GEMMA_ACT,
            blocks={**BLOCK, **_SANDWICH, **_QK_NORMS},
            norm_offset=1.0,
            config=_gemma3,
        ),
        "phi3": GgufFamily(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            blocks={**BLOCK, **_FUSED},
            partial_rotary=True,
            config=_phi3,
        ),
    }
)
