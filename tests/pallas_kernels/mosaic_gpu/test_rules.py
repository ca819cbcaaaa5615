"""The rules: tilings that fit every shape, and fill the card where the shape allows."""

import itertools
from dataclasses import replace

import pytest
from kernel_cases import PROBLEM

from pallas_kernels.mosaic_gpu.rules import RULES, ampere, hopper

SIZES = (1, 64, 192, 576, 1536, 4096, 11008, 28672)
TOKENS = (1, 3, 8, 17, 64, 65, 130, 1024, 1025, 8192)


@pytest.mark.parametrize("tokens", TOKENS)
def test_hopper_covers_every_shape(tokens):
    for d_in, d_out in itertools.product(SIZES, SIZES):
        tiling = hopper(replace(PROBLEM, tokens=tokens, d_in=d_in, d_out=d_out))
        padded = -(-d_in // 128) * 128
        assert padded % tiling.tile_k == 0
        assert 1 <= tiling.split_k <= padded // tiling.tile_k
        assert tiling.regime == ("decode" if tokens <= 64 else "middle" if tokens <= 1024 else "prefill")
        if tiling.regime == "decode":
            assert tiling.tile_m >= tokens
            blocks = -(-d_out // 64) * tiling.split_k
            # Enough blocks for the card, unless its parts would be shorter than four steps.
            assert blocks >= 264 or padded // tiling.tile_k < 4 * (tiling.split_k + 1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("group_rows", [32, 64, 128, 8192])
def test_ampere_covers_every_shape(tokens, group_rows):
    for d_in, d_out in itertools.product(SIZES, SIZES):
        group = min(group_rows, d_in)
        tiling = ampere(replace(PROBLEM, tokens=tokens, d_in=d_in, d_out=d_out, group_rows=group))
        steps, left = divmod(-(-d_in // 128) * 128, tiling.tile_k)
        assert left == 0
        assert tiling.regime == ("decode" if tokens <= 1024 else "prefill")
        if tiling.regime == "prefill":
            continue
        assert tiling.split_k * tiling.stages <= steps or tiling.split_k == 1
        assert tiling.tile_m >= min(tokens, 32)
        # Shared memory of a block of the smallest cards of this capability, 99 KB.
        words = tiling.tile_n * tiling.tile_k  # of 8 bits, a byte each
        assert tiling.stages * (2 * tiling.tile_m * tiling.tile_k + words) <= 99 * 1024


def test_stacked_experts_fill_a_card_together():
    alone, stacked = (ampere(replace(PROBLEM, d_out=1024, experts=experts)) for experts in (None, 64))
    assert alone.split_k > 1
    assert stacked.split_k == 1


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_candidates_fit_begin_with_the_rule_and_are_all_different(name, tokens):
    rule, problem = RULES[name], replace(PROBLEM, tokens=tokens, d_in=576)
    found = rule.candidates(problem)
    assert found[0] == rule.choose(problem)
    assert len(set(found)) == len(found)
    assert all(640 % tiling.tile_k == 0 and tiling.split_k <= 640 // tiling.tile_k for tiling in found)
    regimes = {tiling.regime for tiling in found}
    assert ("prefill" in regimes) == (tokens > 256)
    if name == "mosaic_hopper" and tokens in (64, 65):
        assert regimes == ({"decode", "middle"} if tokens == 64 else {"middle"})


def test_ampere_keeps_to_the_registers():
    """Sums of a step's groups, all in flight, leave no room for 64 tokens or 128 outputs."""
    for tiling in RULES["mosaic_ampere"].candidates(replace(PROBLEM, tokens=200, group_rows=32)):
        assert tiling.tile_m <= 32
        assert tiling.tile_n == 64
