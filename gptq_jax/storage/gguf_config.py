"""A GGUF file's metadata as Hugging Face's config of the same model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.gguf_families import GGUF_FAMILIES, GgufFamily
from gptq_jax.storage.gguf_header import Header
from gptq_jax.storage.gguf_keys import Keys

DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (DIVISORS, LONG, SHORT)
# Llama 3.1's, the values llama.cpp's converter falls back on; the file holds only the resulting divisors.
LLAMA3_CONTEXT, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0


Factors = Mapping[str, Float[np.ndarray, "_"]]


def family_of(path: Path, header: Header) -> GgufFamily:
    """The architecture of a file; CheckpointError if it is not supported."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise CheckpointError(
            path,
            f"the architecture {architecture!r} is not supported; from GGUF, {', '.join(GGUF_FAMILIES)} are.",
        )
    return GGUF_FAMILIES[architecture]


def gguf_config(path: Path, header: Header, rope_factors: Factors) -> dict[str, Any]:
    """Hugging Face's config of the model in a file.

    Args:
        path: the file, for errors.
        header: its metadata and tensors.
        rope_factors: what rotary frequencies are divided by: the tensors of `ROPE_FACTORS` that the file has.

    Raises:
        CheckpointError: a key is missing or the model has parts this library does not know.
    """
    metadata, tensors = header.metadata, header.tensors
    family = family_of(path, header)
    keys = Keys(path, metadata, metadata["general.architecture"])
    if keys.get("expert_count", int, 0):
        raise CheckpointError(path, "mixture-of-experts models are not supported from GGUF.")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(path, "has no matrix token_embd.weight.")
    heads = keys.positive("attention.head_count", int)
    hidden = keys.positive("embedding_length", int)
    rotary = keys.get("rope.dimension_count", int, None)
    whole = hidden // heads if family.partial_rotary else rotary or hidden // heads
    head_dim = keys.positive("attention.key_length", int, whole)
    partial = 1.0 if rotary is None or not family.partial_rotary else rotary / head_dim
    if keys.get("attention.value_length", int, head_dim) != head_dim or (rotary or head_dim) != partial * head_dim:
        raise CheckpointError(path, f"rotary or value dimensions differ from the key's {head_dim}: not supported.")
    context = keys.positive("context_length", int)
    theta = keys.positive("rope.freq_base", float, 10000.0)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.positive("feed_forward_length", int),
        "num_hidden_layers": keys.positive("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.positive("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": family.act,
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, context, _frequencies(theta, head_dim), rope_factors),
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        **({"partial_rotary_factor": partial} if partial != 1.0 else {}),
        **_token_ids(metadata),
    }
    return {**config, **family.config(keys, config)}


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and ids["eos_token_id"] not in (None, end_of_turn):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    return ids


def _frequencies(theta: float, head_dim: int) -> Float[np.ndarray, "pairs"]:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def _rope_scaling(
    keys: Keys,
    context: int,
    frequencies: Float[np.ndarray, "pairs"],
    factors: Factors,
) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.positive("rope.scaling.factor", float, keys.positive("rope.scale_linear", float, 1.0))
    original = keys.get("rope.scaling.original_context_length", int, None)
    if LONG in factors and SHORT in factors:
        scaling = {"rope_type": "longrope", "original_max_position_embeddings": original or context}
        attention = keys.get("rope.scaling.attn_factor", float, None)
        lists = {"long_factor": factors[LONG].tolist(), "short_factor": factors[SHORT].tolist()}
        return {**scaling, **lists, **({"attention_factor": attention} if attention else {})}
    if (divisors := factors.get(DIVISORS)) is not None:
        if kind != "none":
            raise CheckpointError(keys.path, f"has both rope_freqs.weight and rope scaling {kind!r}: not supported.")
        return _llama3_scaling(keys.path, frequencies, divisors, original or LLAMA3_CONTEXT)
    if kind == "linear" or (kind == "none" and "rope.scale_linear" in keys.values):
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        return {**scaling, "original_max_position_embeddings": original or round(context / factor)}
    if kind != "none":
        raise CheckpointError(keys.path, f"rope scaling {kind!r} is not supported: none, linear, yarn and llama3 are.")
    return None


def llama3_divisors(
    frequencies: Float[np.ndarray, "pairs"], factor: float, low: float, high: float, context: int
) -> Float[np.ndarray, "pairs"]:
    """What Llama 3.1's rope scaling divides each frequency by (transformers `_compute_llama3_parameters`)."""
    turns = context * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_scaling(
    path: Path, frequencies: Float[np.ndarray, "pairs"], divisors: Float[np.ndarray, "pairs"], context: int
) -> dict[str, Any] | None:
    """Find the parameters whose divisors the file stores."""
    divisors = divisors.astype(np.float64).ravel()
    if divisors.shape != frequencies.shape or not np.all(np.isfinite(divisors)) or np.any(divisors < 1 - 1e-5):
        raise CheckpointError(path, f"rope_freqs.weight does not hold {frequencies.size} divisors of at least 1.")
    if np.allclose(divisors, 1, rtol=0, atol=1e-5):
        return None
    factor = float(str(np.float32(np.max(divisors))))
    candidates = [(LLAMA3_LOW, LLAMA3_HIGH, context)]
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if between.sum() >= 2:
        # Linear in the frequency there. The function has a free common factor: low is set to 1.
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
        if offset < 0 < slope:
            candidates.append((1.0, 1 - 1 / offset, round(-slope / offset)))
    for low, high, original in candidates:
        if np.allclose(llama3_divisors(frequencies, factor, low, high, original), divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": round(high, 4),
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(path, "rope_freqs.weight is not Llama 3's scaling: not supported.")
