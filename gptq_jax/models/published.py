"""Published models by name: the fields of their config.json that say how large they are."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _llama(
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    theta: float = 10000.0,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# fmt: off
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 8192, 1e5, tie_word_embeddings=True),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, 5, 8192, 1e5, tie_word_embeddings=True),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, 8192, 130000.0, tie_word_embeddings=True),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "llama-3-70b": _llama(128256, 8192, 28672, 80, 64, 8, 8192, 5e5),
    "llama-3-405b": _llama(128256, 16384, 53248, 126, 128, 8, 131072, 5e5, rope_scaling=_llama3_rope(8.0)),
    "llama-3.2-1b": _llama(
        128256, 2048, 8192, 16, 32, 8, 131072, 5e5,
        head_dim=64, tie_word_embeddings=True, rope_scaling=_llama3_rope(32.0),
    ),
    "llama-3.2-3b": _llama(
        128256, 3072, 8192, 28, 24, 8, 131072, 5e5,
        head_dim=128, tie_word_embeddings=True, rope_scaling=_llama3_rope(32.0),
    ),
    "mistral-7b": {
        **_llama(32000, 4096, 14336, 32, 32, 8, 32768), "model_type": "mistral", "sliding_window": 4096,
    },
})
# fmt: on
