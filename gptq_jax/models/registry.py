"""Which Hugging Face configs are supported."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gptq_jax.models.base import Architecture
from gptq_jax.models.families import bloom, gemma, gpt2, gpt_neox, gptj, llama, opt, phi, qwen, sparse
from gptq_jax.models.families.base import Family, read_config

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bloom": bloom.BLOOM,
        "gemma": gemma.GEMMA,
        "gemma2": gemma.GEMMA2,
        "gemma3": gemma.GEMMA3_OF_SEVERAL,
        "gemma3_text": gemma.GEMMA3,
        "gpt2": gpt2.GPT2,
        "gpt_neo": gpt2.GPT_NEO,
        "gpt_neox": gpt_neox.GPT_NEOX,
        "gptj": gptj.GPTJ,
        "llama": llama.LLAMA,
        "mistral": llama.MISTRAL,
        "mixtral": sparse.MIXTRAL,
        "opt": opt.OPT,
        "phi3": phi.PHI3,
        "qwen2": qwen.QWEN2,
        "qwen3": qwen.QWEN3,
        "qwen3_moe": sparse.QWEN3_MOE,
    }
)


def architecture_from_config(hf_config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config describes.

    Args:
        hf_config: the content of config.json, old or new style (`rope_scaling` or `rope_parameters`).

    Raises:
        ValueError: the model type, or a feature it asks for, is not supported, or a field is missing or of
            another type.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: use one of {sorted(FAMILIES)}.")
    return read_config(model_type, FAMILIES[model_type], hf_config)
