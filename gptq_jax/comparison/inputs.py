"""The tokens that every cell of a comparison sees: windows to calibrate on, by seed, and held-out ones."""

import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from gptq_jax.calibration import batches, sample_windows, token_stream
from gptq_jax.models.adapted import AdaptedModel
from gptq_jax.models.base import Model
from gptq_jax.self_calibration import SELF, self_windows
from gptq_jax.terminal import count_progress

Text = str | Any  # a text, which needs the model's tokenizer, or tokens [time]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tokens, cut.

    Attributes:
        calibration: seed -> batches [batch, length].
        held_out: one stream, a multiple of `eval_length` long.
        eval_length: tokens of a held-out window.
        settings: what they are made of, for the record; equal for equal tokens.
    """

    calibration: dict[int, list[Int32[np.ndarray, "_ length"]]]
    held_out: Int32[np.ndarray, "time"]
    eval_length: int
    settings: dict[str, Any]


def cut_inputs(
    model: Model | AdaptedModel,
    calibration: Text,
    held_out: Text,
    *,
    seeds: Sequence[int],
    samples: int,
    length: int | None,
    batch_size: int,
    eval_length: int | None,
    eval_windows: int | None,
    progress: bool = False,
) -> Inputs:
    """Cut both texts; arguments and errors are those of `compare_methods`."""
    context = model.config.context_length if isinstance(model, Model) else sys.maxsize
    length = _checked("length", length or min(2048, context), context)
    eval_length = _checked("eval_length", eval_length or length, context)
    if eval_windows is not None and eval_windows < 1:
        raise ValueError(f"eval_windows={eval_windows} must be at least 1.")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)} must be different numbers, none negative, and at least one.")
    writes = isinstance(calibration, str) and calibration == SELF
    fit = None if writes else _tokens(model, "calibration", calibration)
    measure = _tokens(model, "held_out", held_out)
    windows = measure.size // eval_length
    if not windows:
        raise ValueError(f"held_out has {measure.size} tokens, less than one window of {eval_length}: use more text.")
    windows = min(windows, eval_windows or windows)
    measure = measure[: windows * eval_length]
    how = {"samples": samples, "length": length}
    if fit is None:
        of_seed = {seed: _written(model, seed, batch_size, progress, how) for seed in seeds}
    else:
        of_seed = {seed: sample_windows(fit, seed=seed, **how) for seed in seeds}
    return Inputs(
        calibration={seed: batches(found, batch_size) for seed, found in of_seed.items()},
        held_out=measure,
        eval_length=eval_length,
        settings={
            "calibration_tokens": SELF if fit is None else _digest(fit),
            "samples": samples,
            "length": length,
            "batch_size": batch_size,
            "held_out_tokens": _digest(measure),
            "eval_length": eval_length,
            "eval_windows": windows,
        },
    )


def _written(
    model: Model | AdaptedModel, seed: int, batch_size: int, progress: bool, how: dict[str, int]
) -> Int32[np.ndarray, "samples length"]:
    title = f"writing calibration tokens, seed {seed}"
    with count_progress(title) if progress else nullcontext() as show:
        return self_windows(model, seed=seed, batch_size=batch_size, on_token=show, **how)  # type: ignore[arg-type]


def _checked(name: str, length: int, context: int) -> int:
    if not 2 <= length <= context:
        raise ValueError(f"{name}={length} must be at least 2 and at most the model's context of {context} tokens.")
    return length


def _tokens(model: Model | AdaptedModel, name: str, text: Text) -> Int32[np.ndarray, "time"]:
    if isinstance(text, str):
        return token_stream(text, model.tokenizer)
    tokens = np.asarray(text)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} has shape {tokens.shape} of {tokens.dtype}: pass a text, or its tokens [time].")
    return tokens.astype(np.int32)


def _digest(tokens: Int32[np.ndarray, "time"]) -> str:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
