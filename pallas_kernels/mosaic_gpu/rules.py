"""How products are cut up on a card that nobody measured, and what a tuner tries: a rule for each kind of GPU."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from pallas_kernels.mosaic_gpu.tuning import (
    DECODE_TOKENS,
    LAYOUT_K,
    LAYOUT_N,
    MIDDLE_TOKENS,
    Tiling,
    padded_inputs,
    tokens_of,
)
from pallas_kernels.weight import Problem

PREFILL = Tiling(regime="prefill", tile_m=128, tile_n=128)
_TOKEN_TILES = (8, 16, 32, 64)
_HOPPER_BLOCKS = 264  # two for each of the 132 multiprocessors of an H100
_HOPPER_STEPS = 4  # of a part of the inputs, at least: fewer leave a pipeline no time to fill
_AMPERE_BLOCKS = 324  # three for each of the 108 multiprocessors of an A100
_AMPERE_STEPS = 8  # twice what is in flight


def hopper(problem: Problem) -> Tiling:
    """Enough blocks to fill an H100, and steps long enough to be fed."""
    tokens = tokens_of(problem)
    if tokens > MIDDLE_TOKENS:
        return PREFILL
    if tokens > DECODE_TOKENS:
        tile_m = 128 if tokens <= 128 else 256
        return Tiling(regime="middle", tile_m=tile_m, tile_n=LAYOUT_N, tile_k=LAYOUT_K, stages=4, warpgroups=2)
    tile_m = next(tile for tile in _TOKEN_TILES if tokens <= tile)
    columns = -(-problem.d_out // LAYOUT_N)
    wide = (512, 256, 128) if columns >= _HOPPER_BLOCKS else (256, 128)
    tile_k = next(width for width in wide if padded_inputs(problem) % width == 0)
    steps = padded_inputs(problem) // tile_k
    split_k = min(-(-_HOPPER_BLOCKS // columns), max(steps // _HOPPER_STEPS, 1))
    return Tiling(tile_m=tile_m, tile_k=tile_k, stages=max(1, min(4, steps // split_k)), split_k=split_k)


def hopper_candidates(problem: Problem) -> list[Tiling]:
    """The rule's own tiling first, then its neighbours that fit, and the next regime."""
    tokens = tokens_of(problem)
    found = [first := hopper(problem)]
    if tokens <= DECODE_TOKENS:
        for tile_k in (128, 256, 512):
            for split_k in (1, 2, 4, 8, 16):
                for stages in (2, 4, 6):
                    found.append(Tiling(tile_m=first.tile_m, tile_k=tile_k, stages=stages, split_k=split_k))
    if DECODE_TOKENS // 2 < tokens <= 2 * MIDDLE_TOKENS:
        for tile_m in (64, 128, 256):
            for tile_k in (128, 256):
                for stages in (2, 3, 4):
                    found.append(Tiling(regime="middle", tile_m=tile_m, tile_k=tile_k, stages=stages, warpgroups=2))
    if tokens > MIDDLE_TOKENS // 4:
        found.append(PREFILL)
    return _fitting(found, problem)


def ampere(problem: Problem) -> Tiling:
    """Tiles that fit the registers, and parts enough for all `problem.experts` products to fill an A100."""
    tokens = tokens_of(problem)
    if tokens > MIDDLE_TOKENS:
        return PREFILL
    tile_m = min(next((tile for tile in _TOKEN_TILES if tokens <= tile), 64), _most_tokens(problem))
    tile_n = 2 * LAYOUT_N if tile_m == 32 and _large_groups(problem) else LAYOUT_N
    tile_k = 2 * LAYOUT_K if tile_m <= 16 and padded_inputs(problem) % (2 * LAYOUT_K) == 0 else LAYOUT_K
    steps = padded_inputs(problem) // tile_k
    blocks = (problem.experts or 1) * -(-problem.d_out // tile_n) * -(-tokens // tile_m)
    split_k = max(1, min(_AMPERE_BLOCKS // blocks, steps // _AMPERE_STEPS))
    return Tiling(tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, stages=min(4, steps // split_k), split_k=split_k)


def ampere_candidates(problem: Problem) -> list[Tiling]:
    """The rule's own tiling first, then those around it, and the next regime."""
    tokens = tokens_of(problem)
    found = [first := ampere(problem)]
    if tokens <= MIDDLE_TOKENS:
        for tile_m in (first.tile_m,) if tokens <= 16 else (32, _most_tokens(problem)):
            for tile_n in (LAYOUT_N, 2 * LAYOUT_N) if _large_groups(problem) and tile_m <= 32 else (LAYOUT_N,):
                for tile_k in (LAYOUT_K, 2 * LAYOUT_K):
                    for split_k in (1, 2, 4, 8):
                        tile = Tiling(tile_m=tile_m, tile_n=tile_n, tile_k=tile_k, split_k=split_k)
                        found += [replace(tile, stages=2), tile]
    if tokens > MIDDLE_TOKENS // 4:
        found.append(PREFILL)
    return _fitting(found, problem)


class Rule(NamedTuple):
    """What there is for a kernel: the tiling of a problem, and those that are worth measuring, it first."""

    choose: Callable[[Problem], Tiling]
    candidates: Callable[[Problem], list[Tiling]]


RULES = {"mosaic_hopper": Rule(hopper, hopper_candidates), "mosaic_ampere": Rule(ampere, ampere_candidates)}


def _large_groups(problem: Problem) -> bool:
    """Whether a step's inputs share their scales; else the sums of its groups, all in flight, need more registers."""
    return problem.group_rows >= min(LAYOUT_K, problem.d_in)


def _most_tokens(problem: Problem) -> int:
    return 64 if _large_groups(problem) else 32


def _fitting(tilings: Iterable[Tiling], problem: Problem) -> list[Tiling]:
    return [tiling for tiling in dict.fromkeys(tilings) if tiling.fits(problem)]
