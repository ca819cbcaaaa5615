"""Real models by their shape."""

from typing import cast

from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.published import PUBLISHED
from gptq_jax.models.registry import architecture_from_config


def _published(name: str) -> DecoderConfig:
    return cast(DecoderConfig, architecture_from_config(PUBLISHED[name]))


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        context_length=4096,
    )


SHAPES = {
    "llama-7b": _published("llama-2-7b"),
    "llama-13b": _published("llama-2-13b"),
    "llama-70b": _published("llama-2-70b"),
    "qwen-7b": _shape(152064, 3584, 18944, 28, 28, 4),
    "qwen-14b": _shape(152064, 5120, 13824, 48, 40, 8),
    "smollm2": _published("smollm2-135m"),
}


def shape_of(name: str) -> DecoderConfig:
    """The model of that name in `SHAPES`, or ValueError naming those there are."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown: use one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def products(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the products of a block, q/k/v and gate/up each in one."""
    inner_heads = config.num_heads * config.head_dim
    return {
        "qkv": (config.hidden_size, inner_heads + 2 * config.num_kv_heads * config.head_dim),
        "o": (inner_heads, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }
