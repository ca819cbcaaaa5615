"""Typed access to the metadata of a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptq_jax.storage.base import CheckpointError


class Keys:
    """The metadata under an architecture's name.

    Attributes:
        path: the file, for errors.
        architecture: what the keys begin with.
        values: by the rest of their keys.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self.path, self.architecture = path, architecture
        begin = f"{architecture}."
        self.values = {key.removeprefix(begin): value for key, value in metadata.items() if key.startswith(begin)}

    def get(self, key: str, kind: type, default: Any) -> Any:
        """A value, or `default` where there is none; CheckpointError if it is of another type."""
        if key not in self.values:
            return default
        value: Any = self.values[key]
        if kind is float and isinstance(value, float) and math.isfinite(value):
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        if kind is int and type(value) is int and 0 <= value < 2**31:
            return value
        if kind is str and isinstance(value, str):
            return value
        shown = f"{len(value)} values" if isinstance(value, list) else repr(value)
        raise CheckpointError(self.path, f"metadata {self.architecture}.{key} is {shown}, not one {kind.__name__}.")

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """A number above 0, or `default`; CheckpointError if there is neither."""
        value = self.get(key, kind, default)
        if value is None or value <= 0:
            raise CheckpointError(self.path, f"metadata {self.architecture}.{key} is missing or not positive.")
        return value
