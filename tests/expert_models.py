"""The tiny models with experts of tests/architecture_cases.py, as tests use them."""

import tempfile
from functools import lru_cache
from pathlib import Path

import architecture_cases as cases
import numpy as np

from gptq_jax.models.base import Model
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.load import load

SPEC = QuantSpec(bits=4, group_size=16, scale_dtype="float16")
PROJECTIONS = tuple(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down"))


def checkpoint(folder: Path, name: str) -> Path:
    """A directory as transformers saves it."""
    oracle = cases.oracle(name)
    return cases.write_checkpoint(folder, oracle["config"], oracle["tensors"])


@lru_cache
def float_model(name: str) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return load(checkpoint(Path(folder), name))


def batches(count: int = 2, *, seed: int = 1, shape: tuple[int, int] = (4, 32)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 48, shape, dtype=np.int32) for _ in range(count)]


def routed_by_hand(x: np.ndarray, router: np.ndarray, top_k: int, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each row of `x`, likeliest first, and their weights, in float64."""
    logits = x.astype(np.float64) @ router.astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, experts, axis=-1)
    return experts, weights / weights.sum(-1, keepdims=True) if normalize else weights
