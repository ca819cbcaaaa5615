"""Rotary position embedding in Hugging Face's convention, which rotates halves of a head."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

Setting = float | tuple[float, ...]
Settings = dict[str, Any]  # the numbers of a kind, by their names in Hugging Face configs


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation's frequencies, and what of a head it turns; hashable.

    Attributes:
        theta: base of the geometric series.
        kind: how the context was stretched, a name in `SCALINGS`.
        settings: the numbers that kind needs, by their names in Hugging Face configs.
        partial: the share of a head, from its beginning, that is rotated.
        interleaved: the members of a pair are neighbours, not half the rotated part apart.
    """

    theta: float = 10000.0
    kind: str = "default"
    settings: tuple[tuple[str, Setting], ...] = ()
    partial: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ValueError(f"rope type {self.kind!r} is not supported: use one of {sorted(SCALINGS)}.")
        if not self.theta > 0:
            raise ValueError(f"rope_theta={self.theta} must be positive.")
        if not 0 < self.partial <= 1:
            raise ValueError(f"partial_rotary_factor={self.partial} must be above 0 and at most 1.")
        missing = [name for name in SCALINGS[self.kind].needs if name not in dict(self.settings)]
        if missing:
            raise ValueError(f"rope type {self.kind!r} needs {', '.join(missing)} in rope_parameters.")

    def rotated(self, head_dim: int) -> int:
        """How many of a head's values are rotated."""
        return int(head_dim * self.partial)

    def frequencies(self, head_dim: int, length: int = 0) -> tuple[np.ndarray, float]:
        """Radians per position, float32 [rotated // 2], and the factor on cosine and sine.

        Args:
            head_dim: width of a head.
            length: tokens that the text may have; some kinds turn more slowly in long ones.
        """
        rotated = self.rotated(head_dim)
        base = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        settings = {**dict(self.settings), "length": length}
        frequencies, factor = SCALINGS[self.kind].scale(base, self.theta, settings)
        return frequencies.astype(np.float32), factor


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    positions: Int32[Array, "#batch time"],
    rope: Rope,
    length: int = 0,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotate each head's pairs (i, i + rotated/2) by their angle at `positions`, in float32.

    Args:
        x: queries or keys.
        positions: of the tokens.
        rope: what is rotated, and how fast.
        length: as for `Rope.frequencies`.
    """
    rotated = rope.rotated(x.shape[-1])
    if rotated < x.shape[-1]:
        turned = rotate(x[..., :rotated], positions, replace(rope, partial=1.0), length)
        return jnp.concatenate([turned, x[..., rotated:]], axis=-1)
    frequencies, factor = rope.frequencies(rotated, length)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    x32 = x.astype(jnp.float32)
    if rope.interleaved:
        first, second = x32[..., ::2], x32[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return pairs.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x32, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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


def _longrope(base: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency has a divisor for short texts, and one for long.

    The text's greatest length decides, so that all keys of a cache are rotated alike.
    """
    original = settings["original_max_position_embeddings"]
    divisors = np.asarray(settings["long_factor" if settings["length"] > original else "short_factor"])
    if divisors.shape != base.shape:
        raise ValueError(f"rope type 'longrope' has {divisors.size} factors, but {base.size} pairs are rotated.")
    attention = settings.get("attention_factor")
    if attention is None:
        stretched = settings["factor"]
        attention = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    return base / divisors, attention


SCALINGS: dict[str, _Scaling] = {
    "default": _Scaling((), _default),
    "linear": _Scaling(("factor",), _linear),
    "llama3": _Scaling(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _llama3),
    "longrope": _Scaling(("factor", "short_factor", "long_factor", "original_max_position_embeddings"), _longrope),
    "yarn": _Scaling(("factor", "original_max_position_embeddings"), _yarn),
}
