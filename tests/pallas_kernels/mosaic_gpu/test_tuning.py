"""The choice of tilings: a table where there is one, else the rule."""

import json
from dataclasses import replace

import pytest
from kernel_cases import PROBLEM

from pallas_kernels.mosaic_gpu import rules, tuning
from pallas_kernels.mosaic_gpu.tuning import Tiling, forced, record, table_path

CARD = "NVIDIA H100 80GB HBM3"
MEASURED = Tiling(tile_m=16, tile_k=512, stages=6, split_k=2)


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("PALLAS_KERNELS_TUNED", str(tmp_path))
    return tmp_path


def choose(card, problem):
    return tuning.choose(card, problem, rules.hopper)


def test_a_measured_tiling_serves_its_shape_and_those_near_it():
    assert choose(CARD, PROBLEM) == rules.hopper(PROBLEM)
    record(CARD, PROBLEM, MEASURED, 7.5, jax="0.0")
    for near in ({}, {"tokens": 9}, {"d_out": 12288}, {"x_dtype": "float16"}, {"zeros": "float32"}):
        assert choose(CARD, replace(PROBLEM, **near)) == MEASURED
    for far in ({"tokens": 17}, {"tokens": 8}, {"d_out": 4096}, {"bits": 8}, {"group_rows": 64}):
        other = replace(PROBLEM, **far)
        assert choose(CARD, other) == rules.hopper(other)
    assert choose("NVIDIA H200", PROBLEM) == rules.hopper(PROBLEM)


def test_a_near_tiling_that_does_not_fit_is_left():
    record(CARD, PROBLEM, MEASURED, 7.5)
    other = replace(PROBLEM, d_in=4096 + 128)  # 33 tiles of 128: no steps of 512
    assert choose(CARD, other) == rules.hopper(other)


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
    assert choose(CARD, replace(column, d_in=5120)) == rules.hopper(replace(column, d_in=5120))


def test_forced_while_tracing():
    with forced(MEASURED):
        assert choose(CARD, replace(PROBLEM, tokens=3000)) == MEASURED
    assert choose(CARD, PROBLEM) == rules.hopper(PROBLEM)


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
