"""A decoder's configuration as GGUF metadata: the inverse of `storage.gguf_config`."""

from typing import Any

import numpy as np
from jaxtyping import Float

from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.storage.gguf_config import llama3_divisors

UNSAID = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}  # of YaRN: what readers of GGUF take for granted


def llama_metadata(config: DecoderConfig) -> tuple[dict[str, Any], Float[np.ndarray, "pairs"] | None]:
    """Metadata under `llama.`, and the tensor rope_freqs.weight, or None where there is none.

    Raises:
        ValueError: the architecture `llama` of GGUF has no such part.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r}: llama in GGUF has silu only.")
    metadata: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.sliding_window is not None:
        metadata["attention.sliding_window"] = config.sliding_window
    scaling, divisors = _rope(config)
    return {f"llama.{key}": value for key, value in {**metadata, **scaling}.items()}, divisors


def _rope(config: DecoderConfig) -> tuple[dict[str, Any], Float[np.ndarray, "pairs"] | None]:
    kind, settings = config.rope.kind, dict(config.rope.settings)
    if kind == "default":
        return {}, None
    factor = settings["factor"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, None
    original = round(settings["original_max_position_embeddings"])
    if kind == "llama3":
        base = config.rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        divisors = llama3_divisors(base, factor, low, high, original).astype(np.float32)
        return {"rope.scaling.original_context_length": original}, divisors
    other = {
        name: value
        for name, value in settings.items()
        if name not in ("factor", "original_max_position_embeddings") and value != UNSAID.get(name)
    }
    if kind != "yarn" or other:
        raise ValueError(f"rope scaling {kind!r} with {other} has no place in GGUF.")
    scaling = {"type": "yarn", "factor": factor, "original_context_length": original}
    return {f"rope.scaling.{key}": value for key, value in scaling.items()}, None
