"""A tiny model, calibration tokens and a way to see compilations, for the tests of everything that quantizes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import decoder_cases
import jax
import numpy as np
from decoder_models import build

from gptq_jax.models.base import Model

CONFIG = decoder_cases.CASES["tied_gqa"]
BATCHES = [np.random.default_rng(seed).integers(0, 96, (3, 24), dtype=np.int32) for seed in range(2)]


def float_model(*, layers: int = 2, case: str = "tied_gqa", seed: int = 0, dtype: str = "float32") -> Model:
    return build({**decoder_cases.CASES[case], "num_hidden_layers": layers}, seed=seed, dtype=dtype)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of what is compiled inside the `with` block, as JAX logs them."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Compiling" in record.getMessage():
                found.append(record.getMessage()[:100])

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    try:
        with jax.log_compiles(True):
            yield found
    finally:
        logger.removeHandler(handler)
