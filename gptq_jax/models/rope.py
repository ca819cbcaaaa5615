"""Rotary position embedding in Hugging Face's convention, which rotates halves of a head."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation's frequencies; hashable.

    Attributes:
        theta: base of the geometric series.
        kind: how the context was stretched, a name in `SCALINGS`.
        settings: the numbers that kind needs, by their names in Hugging Face configs.
    """

    theta: float = 10000.0
    kind: str = "default"
    settings: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"rope type {self.kind!r} is not supported: use one of {sorted(SCALINGS)}.")
        if not self.theta > 0:
            raise ValueError(f"rope_theta={self.theta} must be positive.")
        missing = [name for name in SCALINGS[self.kind].needs if name not in dict(self.settings)]
        if missing:
            raise ValueError(f"rope type {self.kind!r} needs {', '.join(missing)} in rope_parameters.")

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position, float32 [head_dim // 2], and the factor on cosine and sine."""
        base = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        frequencies, factor = SCALINGS[self.kind].scale(base, self.theta, dict(self.settings))
        return frequencies.astype(np.float32), factor


def rotate(
    x: Float[Array, "batch time heads head_dim"], positions: Int32[Array, "#batch time"], rope: Rope
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate each head's pairs (i, i + head_dim/2) by their angle at `positions`, in float32."""
    frequencies, factor = rope.frequencies(x.shape[-1])
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


Settings = dict[str, float]


@dataclass(frozen=True)
class _Scaling:
    needs: tuple[str, ...]
    scale: Callable[[np.ndarray, float, Settings], tuple[np.ndarray, float]]


def _default(base: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    return base, 1.0


def _linear(base: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    return base / settings["factor"], 1.0


def _llama3(base: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * base / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return base * (kept + (1 - kept) / settings["factor"]), 1.0


def _yarn(base: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), with the options of Hugging Face's implementation."""
    pairs, factor = len(base), settings["factor"]

    def pair_that_turns(turns: float) -> float:
        return pairs * math.log(settings["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    low = pair_that_turns(settings.get("beta_fast") or 32.0)
    high = pair_that_turns(settings.get("beta_slow") or 1.0)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = settings.get("attention_factor")
    if attention is None:
        attention = temperature(1.0)
        if settings.get("mscale") and settings.get("mscale_all_dim"):
            attention = temperature(settings["mscale"]) / temperature(settings["mscale_all_dim"])
    return base * (stretched / factor + 1 - stretched), attention


SCALINGS: dict[str, _Scaling] = {
    "default": _Scaling((), _default),
    "linear": _Scaling(("factor",), _linear),
    "llama3": _Scaling(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _llama3),
    "yarn": _Scaling(("factor", "original_max_position_embeddings"), _yarn),
}
