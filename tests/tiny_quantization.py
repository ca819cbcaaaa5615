"""A tiny model, calibration tokens and a way to see compilations, for the tests of everything that quantizes."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
from decoder_models import build

from gptq_jax.hooks.nnx import kernel_of, with_kernel
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.base import Model, linear_paths
from gptq_jax.spec import QuantSpec

CONFIG = decoder_cases.CASES["tied_gqa"]
BATCHES = [np.random.default_rng(seed).integers(0, 96, (3, 24), dtype=np.int32) for seed in range(2)]


def float_model(*, layers: int = 2, case: str = "tied_gqa", seed: int = 0, dtype: str = "float32") -> Model:
    return build({**decoder_cases.CASES[case], "num_hidden_layers": layers}, seed=seed, dtype=dtype)


def rounded(model: Model, spec: QuantSpec, targets: str = "") -> Model:
    """With the layers that the regex is found in rounded to nearest: much less to compile than the pipeline has."""
    layers = []
    for index, block in enumerate(model.params["layers"]):
        for path in linear_paths(model.config, model.config.layer_kind(index)):
            if re.search(targets, path):
                kernel = kernel_of(block, path)
                experts = [round_to_nearest(each, spec) for each in (kernel if kernel.ndim == 3 else kernel[None])]
                packed = experts[0] if kernel.ndim == 2 else jax.tree.map(lambda *each: jnp.stack(each), *experts)
                block = with_kernel(block, path, packed)
        layers.append(block)
    return replace(model, params={**model.params, "layers": layers})


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
