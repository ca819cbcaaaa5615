"""A decoder's configuration as GGUF metadata: the inverse of `storage.gguf_config`."""

from dataclasses import MISSING, Field, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.rope import Rope
from gptq_jax.storage.gguf_config import llama3_divisors

HELD = (  # fields that have a key, or whose tensors say it; all others must be as they are in Llama
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("context_length", "rope", "norm_eps", "hidden_act", "attention_bias", "mlp_bias", "sliding_window"),
    "tie_embeddings",
)
UNSAID = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}  # of YaRN: what readers of GGUF take for granted


def llama_metadata(config: DecoderConfig) -> tuple[dict[str, Any], Float[np.ndarray, "pairs"] | None]:
    """Metadata under `llama.`, and the tensor rope_freqs.weight, or None where there is none.

    Raises:
        ValueError: the architecture `llama` of GGUF has no such part.
    """
    for other in fields(config):
        if other.name not in HELD and (value := getattr(config, other.name)) != _default(other):
            raise ValueError(
                f"{other.name}={value!r:.60} has no counterpart in a GGUF file of a Llama or Mistral model."
            )
    rope = config.rope
    if rope is None or rope.partial != 1.0 or rope.interleaved:
        raise ValueError(f"{rope} has no counterpart in GGUF: only rotation of whole heads, by halves, has one.")
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
        "rope.freq_base": float(rope.theta),
    }
    if config.sliding_window is not None:
        metadata["attention.sliding_window"] = config.sliding_window
    scaling, divisors = _rope(rope, config.head_dim)
    return {f"llama.{key}": value for key, value in {**metadata, **scaling}.items()}, divisors


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _rope(rope: Rope, head_dim: int) -> tuple[dict[str, Any], Float[np.ndarray, "pairs"] | None]:
    kind = rope.kind
    settings: dict[str, Any] = dict(rope.settings)
    if kind == "default":
        return {}, None
    factor = settings["factor"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, None
    original = round(settings["original_max_position_embeddings"])
    if kind == "llama3":
        base = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
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
