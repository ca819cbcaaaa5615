"""Models of tests/architecture_cases.py, loaded from directories as Hugging Face has them."""

from pathlib import Path

import architecture_cases

from gptq_jax.models.base import Model
from gptq_jax.storage import load


def float_case(name: str, folder: Path) -> Model:
    """A tiny model of a family, with random weights."""
    found = architecture_cases.oracle(name)
    return load(architecture_cases.write_checkpoint(folder, found["config"], found["tensors"]))
