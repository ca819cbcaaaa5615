"""How a kernel cuts its product up: from measurements on the device where there are any, else by a rule.

A table is a JSON file for each device, `tuned/<device>.json`, written by `gptq-jax bench kernels --tune`. An entry
serves its own shape, and shapes within half an octave of it that its tiling fits. `PALLAS_KERNELS_TUNED` names a
directory that is used in place of the package's.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from pallas_kernels.weight import Problem

REGIMES = ("decode", "middle", "prefill")
LAYOUT_K = 128  # inputs of a tile of the shuffled layout: what d_in is padded to
LAYOUT_N = 64  # its outputs
DECODE_TOKENS = 64
MIDDLE_TOKENS = 1024
_NEAR = 0.5  # octaves


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the product is cut up; hashable, so a static argument of jit.

    Attributes:
        regime: which kernel, one of `REGIMES`.
        tile_m: tokens of a tile.
        tile_n: outputs of a tile of one warpgroup; a multiple of 64.
        tile_k: inputs of a step of the pipeline; a multiple of 128 that divides d_in padded to 128.
        stages: steps in flight.
        split_k: parts into which the steps are cut, each summed by its own block and added up afterwards; parts
            differ by at most one step.
        warpgroups: that compute, in the middle regime.
    """

    regime: str = "decode"
    tile_m: int = 8
    tile_n: int = LAYOUT_N
    tile_k: int = LAYOUT_K
    stages: int = 4
    split_k: int = 1
    warpgroups: int = 1

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"regime={self.regime!r} is unknown: use one of {list(REGIMES)}.")
        for name, unit in (("tile_m", 8), ("tile_n", LAYOUT_N), ("tile_k", LAYOUT_K)):
            if getattr(self, name) < unit or getattr(self, name) % unit:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive multiple of {unit}.")
        for name in ("stages", "split_k", "warpgroups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def fits(self, problem: Problem) -> bool:
        """Whether steps of `tile_k` fill d_in padded to 128, and there are as many as parts."""
        steps, left = divmod(padded_inputs(problem), self.tile_k)
        return not left and self.split_k <= steps


_forced: ContextVar[Tiling | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(tiling: Tiling) -> Iterator[None]:
    """Make `choose` return `tiling` while tracing in this context; clear JAX's caches before each."""
    token = _forced.set(tiling)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(device_kind: str, problem: Problem, rule: Callable[[Problem], Tiling]) -> Tiling:
    """The tiling of `problem`: the nearest entry of the device's table, else that of the kernel's rule.

    Args:
        device_kind: as `jax.Device.device_kind` has it; one that has no table gets the rule.
        problem: with a known number of tokens.
        rule: one of `rules`.
    """
    if (tiling := _forced.get()) is not None:
        return tiling
    near = [
        (distance, tiling)
        for entry, tiling in _table(table_path(device_kind))
        if (distance := _distance(entry, problem)) is not None and tiling.fits(problem)
    ]
    return min(near, key=lambda pair: pair[0])[1] if near else rule(problem)


def tokens_of(problem: Problem) -> int:
    """The tokens of `problem`, at least one; ValueError where they are not known."""
    if problem.tokens is None:
        raise ValueError("problem.tokens is None: a tiling depends on the number of tokens.")
    return max(problem.tokens, 1)


def padded_inputs(problem: Problem) -> int:
    """d_in as the shuffled layout pads it."""
    return -(-problem.d_in // LAYOUT_K) * LAYOUT_K


def token_class(tokens: int) -> int:
    """The power of two, at least 8, that `tokens` is rounded up to."""
    return max(8, 1 << (tokens - 1).bit_length())


def table_path(device_kind: str) -> Path:
    """Where the table of a device is kept."""
    directory = os.environ.get("PALLAS_KERNELS_TUNED") or Path(__file__).parent / "tuned"
    return Path(directory) / f"{re.sub('[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def record(device_kind: str, problem: Problem, tiling: Tiling, microseconds: float, **about: Any) -> Path:
    """Put a measurement into the device's table, in place of an earlier one of the same problem.

    Args:
        device_kind: as `jax.Device.device_kind` has it.
        problem: with a known number of tokens.
        tiling: the fastest.
        microseconds: its time.
        about: what else the entry should say, like versions and the date.
    """
    path = table_path(device_kind)
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    key = _key(problem)
    entries = [entry for entry in entries if any(entry[name] != value for name, value in key.items())]
    entries.append({**key, "tiling": asdict(tiling), "microseconds": round(microseconds, 3), **about})
    entries.sort(key=lambda entry: [entry[name] for name in key])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"device": device_kind, "entries": entries}, indent=1) + "\n")
    partial.replace(path)
    _table.cache_clear()
    return path


def _key(problem: Problem) -> dict[str, int]:
    return {
        "bits": problem.bits,
        "group_rows": problem.group_rows,
        "d_in": problem.d_in,
        "d_out": problem.d_out,
        "tokens": token_class(tokens_of(problem)),
    }


@lru_cache
def _table(path: Path) -> tuple[tuple[dict[str, Any], Tiling], ...]:
    if not path.exists():
        return ()
    try:
        known = {field.name for field in fields(Tiling)}
        return tuple(
            (entry, Tiling(**{name: value for name, value in entry["tiling"].items() if name in known}))
            for entry in json.loads(path.read_text())["entries"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning table ({error}): delete it, or measure it anew.") from None


def _distance(entry: dict[str, Any], problem: Problem) -> float | None:
    """Octaves between the shapes; None where they are too far apart, or the grid or the tokens differ."""
    key = _key(problem)
    columns = entry["group_rows"] == entry["d_in"], problem.group_rows == problem.d_in
    same_groups = all(columns) or (not any(columns) and entry["group_rows"] == problem.group_rows)
    if entry["bits"] != key["bits"] or entry["tokens"] != key["tokens"] or not same_groups:
        return None
    octaves = [abs(math.log2(entry[name] / key[name])) for name in ("d_in", "d_out")]
    return sum(octaves) if max(octaves) <= _NEAR else None
