"""Where files that can be made again are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$GPTQ_JAX_CACHE, or gptq-jax in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GPTQ_JAX_CACHE") or Path(base) / "gptq-jax")
