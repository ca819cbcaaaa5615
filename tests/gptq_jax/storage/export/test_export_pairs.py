"""load -> save -> load -> export -> load, between every two formats that keep weights packed."""

import pytest
from export_models import assert_same_bits, packed_leaves, packed_model

from gptq_jax.spec import QuantSpec
from gptq_jax.storage import load, save
from gptq_jax.storage.export import export

PACKED = ("store", "gptq", "gptq_v2", "compressed-tensors")
GRIDS = {
    "w4 g32": QuantSpec(group_size=32),
    "w4 g32 asym": QuantSpec(group_size=32, symmetric=False),
    "w3 g32 asym": QuantSpec(bits=3, group_size=32, symmetric=False),
    "w3 column": QuantSpec(bits=3, group_size=-1),
    "w2 g16": QuantSpec(bits=2, group_size=16),
    "w8 g32": QuantSpec(bits=8, group_size=32),
    "w8 g16 asym": QuantSpec(bits=8, group_size=16, symmetric=False),
    "w4 g32 in activation order": QuantSpec(group_size=32, symmetric=False),
    "w4 ragged": QuantSpec(group_size=40),
}


def formats(grid: str) -> list[str]:
    """Those that can hold the grid; the others' refusals have tests of their own."""
    spec = GRIDS[grid]
    found = list(PACKED)
    if not spec.symmetric:
        found.remove("gptq")
    if grid.endswith(("order", "ragged")):
        found.remove("compressed-tensors")
    return found


def write(model, path, format):
    if format == "store":
        save(model, path)
    else:
        assert export(model, path, format=format) == ()


@pytest.mark.parametrize("grid", GRIDS)
def test_all_pairs(tmp_path, grid):
    made, _ = packed_model(GRIDS[grid], ordered=not grid.endswith("order"))
    assert len(packed_leaves(made)) == 7
    for first in formats(grid):
        write(made, tmp_path / first, first)
        one = load(tmp_path / first)
        assert_same_bits(one, made)
        save(one, tmp_path / f"{first}-saved")
        saved = load(tmp_path / f"{first}-saved")
        assert_same_bits(saved, made)
        for second in formats(grid):
            write(saved, tmp_path / f"{first}-{second}", second)
            assert_same_bits(load(tmp_path / f"{first}-{second}"), made)


@pytest.mark.parametrize("format", ["store", "gptq_v2", "compressed-tensors"])
def test_several_grids_a_float_layer_and_a_packed_head(tmp_path, format):
    others = {
        "mlp.up_proj": QuantSpec(bits=8, group_size=-1),
        "self_attn.k_proj": QuantSpec(bits=3, group_size=32, symmetric=False),
        "self_attn.v_proj": None,
        "lm_head": QuantSpec(group_size=64),
    }
    made, _ = packed_model(others=others)
    assert "layers.0.self_attn.v_proj.kernel" not in packed_leaves(made)
    write(made, tmp_path / "one", format)
    one = load(tmp_path / "one")
    assert_same_bits(one, made)
    write(one, tmp_path / "two", format)
    assert_same_bits(load(tmp_path / "two"), made)
