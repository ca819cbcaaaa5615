"""What every float checkpoint looks like to the rest of the library."""

from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, then what is wrong with it."""

    def __init__(self, path: str | PathLike[str], problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@runtime_checkable
class TensorSource(Protocol):
    """A float checkpoint: Hugging Face's tensor names and orientation, whatever the file format.

    Attributes:
        path: the file or directory.
        config: as in Hugging Face's config.json.
        config_file: that it was read from.
        format: of the file, in words.
    """

    path: Path
    config: dict[str, Any]
    config_file: Path
    format: str

    def names(self) -> list[str]:
        """Every tensor, by Hugging Face's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it; KeyError if there is none of that name."""

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor, a linear layer's as [d_out, d_in]; float32, float16 or bfloat16; read when asked."""

    def tokenizer(self) -> Any | None:
        """A `transformers.PreTrainedTokenizerFast`, or None if the checkpoint has none."""


@runtime_checkable
class Stored(Protocol):
    """An array in a file."""

    @property
    def file(self) -> Path: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """The array as stored; `name` is for errors."""
