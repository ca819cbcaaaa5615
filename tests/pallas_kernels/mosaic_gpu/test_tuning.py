"""The choice of tilings: a table where there is one, else a rule that fits every shape."""

import itertools
import json
from dataclasses import replace

import pytest

from pallas_kernels.mosaic_gpu import tuning
from pallas_kernels.mosaic_gpu.tuning import Tiling, candidates, choose, forced, heuristic, record, table_path
from pallas_kernels.weight import Problem

CARD = "NVIDIA H100 80GB HBM3"
PROBLEM = Problem(
    tokens=16,
    x_dtype="bfloat16",
    d_in=4096,
    d_out=11008,
    bits=4,
    group_rows=128,
    zeros=None,
    permuted=False,
    platform="gpu",
)
SIZES = (1, 64, 192, 576, 1536, 4096, 11008, 28672)
TOKENS = (1, 3, 8, 17, 64, 65, 130, 1024, 1025, 8192)
MEASURED = Tiling(tile_m=16, tile_k=512, stages=6, split_k=2)


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("PALLAS_KERNELS_TUNED", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_rule_covers_every_shape(tokens):
    for d_in, d_out in itertools.product(SIZES, SIZES):
        tiling = heuristic(replace(PROBLEM, tokens=tokens, d_in=d_in, d_out=d_out))
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
def test_candidates_fit_begin_with_the_rule_and_are_all_different(tokens):
    problem = replace(PROBLEM, tokens=tokens, d_in=576)
    found = candidates(problem)
    assert found[0] == heuristic(problem)
    assert len(set(found)) == len(found)
    assert all(640 % tiling.tile_k == 0 and tiling.split_k <= 640 // tiling.tile_k for tiling in found)
    regimes = {tiling.regime for tiling in found}
    if tokens in (64, 65):
        assert regimes == ({"decode", "middle"} if tokens == 64 else {"middle"})


def test_a_measured_tiling_serves_its_shape_and_those_near_it():
    assert choose(CARD, PROBLEM) == heuristic(PROBLEM)
    record(CARD, PROBLEM, MEASURED, 7.5, jax="0.0")
    for near in ({}, {"tokens": 9}, {"d_out": 12288}, {"x_dtype": "float16"}, {"zeros": "float32"}):
        assert choose(CARD, replace(PROBLEM, **near)) == MEASURED
    for far in ({"tokens": 17}, {"tokens": 8}, {"d_out": 4096}, {"bits": 8}, {"group_rows": 64}):
        other = replace(PROBLEM, **far)
        assert choose(CARD, other) == heuristic(other)
    assert choose("NVIDIA H200", PROBLEM) == heuristic(PROBLEM)


def test_a_near_tiling_that_does_not_fit_is_left():
    record(CARD, PROBLEM, MEASURED, 7.5)
    other = replace(PROBLEM, d_in=4096 + 128)  # 33 tiles of 128: no steps of 512
    assert choose(CARD, other) == heuristic(other)


def test_the_nearest_entry_and_the_last_measurement_win():
    record(CARD, PROBLEM, MEASURED, 7.5)
    other = replace(MEASURED, stages=2)
    record(CARD, replace(PROBLEM, d_out=14336), other, 9.0)
    assert choose(CARD, replace(PROBLEM, d_out=11264)) == MEASURED
    assert choose(CARD, replace(PROBLEM, d_out=13824)) == other
    record(CARD, PROBLEM, replace(MEASURED, stages=3), 7.0)
    assert choose(CARD, PROBLEM).stages == 3
    entries = json.loads(table_path(CARD).read_text())["entries"]
    assert [(entry["d_out"], entry["microseconds"]) for entry in entries] == [(11008, 7.0), (14336, 9.0)]


def test_whole_columns_are_one_class():
    column = replace(PROBLEM, group_rows=4096)
    record(CARD, column, MEASURED, 7.5)
    assert choose(CARD, replace(column, d_in=5120, group_rows=5120)) == MEASURED
    assert choose(CARD, replace(column, d_in=5120)) == heuristic(replace(column, d_in=5120))


def test_forced_while_tracing():
    with forced(MEASURED):
        assert choose(CARD, replace(PROBLEM, tokens=3000)) == MEASURED
    assert choose(CARD, PROBLEM) == heuristic(PROBLEM)


def test_the_table_is_named_after_the_device(directory):
    assert table_path(CARD) == directory / "nvidia_h100_80gb_hbm3.json"


def test_tables_of_the_package_can_be_read(monkeypatch):
    monkeypatch.delenv("PALLAS_KERNELS_TUNED")
    for path in table_path(CARD).parent.glob("*.json"):
        assert tuning._table(path)
    assert choose(CARD, PROBLEM).fits(PROBLEM)


def test_a_damaged_table_is_named(directory):
    table_path(CARD).write_text('{"entries": [{"bits": 4}]}')
    with pytest.raises(ValueError, match=r"nvidia_h100_80gb_hbm3\.json is not a tuning table .*: delete it"):
        choose(CARD, PROBLEM)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"regime": "slow"}, "regime='slow' is unknown"),
        ({"tile_m": 12}, "tile_m=12 must be a positive multiple of 8"),
        ({"tile_n": 32}, "tile_n=32 must be a positive multiple of 64"),
        ({"tile_k": 0}, "tile_k=0 must be a positive multiple of 128"),
        ({"split_k": 0}, "split_k=0 must be positive"),
    ],
)
def test_tilings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**wrong)


def test_an_unknown_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"problem\.tokens is None"):
        choose(CARD, replace(PROBLEM, tokens=None))
