"""What tensor_parallel_child.py found in a process with eight CPU devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"2 bits": 2, "3 bits": 4, "4 bits": 2, "8 bits": 4, "float": 4}  # devices over which weights are cut
HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "tensor_parallel_child.py"), str(tmp_path_factory.mktemp("models"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_one_device(found, case):
    assert found[case]["logits"]
    assert max(found[case]["logits"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_each_device_holds_its_part_only(found, case):
    cut = CASES[case]
    for name, (whole, parts, different) in found[case]["held"].items():
        each = math.prod(whole)
        if ".kernel" in name or "embedding" in name:
            # One row of scales is for the inputs of every part.
            by_inputs = "down_proj" in name or "o_proj" in name
            parts_of_it = 1 if by_inputs and whole[0] == 1 else cut
            each //= parts_of_it
            assert different == parts_of_it, name
        assert {math.prod(part) for part in parts} == {each}, name


def test_layers_are_cut_as_megatron_does(found):
    held = found["4 bits"]["held"]
    part = {name: parts[0] for name, (_, parts, _) in held.items()}
    layer = "layers.0.mlp"
    assert part[f"{layer}.up_proj.kernel.codes"] == [64 * 4 // 32, 128 // 2]
    assert part[f"{layer}.down_proj.kernel.codes"] == [128 * 4 // 32 // 2, 64]
    assert part[f"{layer}.down_proj.kernel.zeros"] == [128 // 16 // 2, 64]
    assert part["embed.embedding"] == [320 // 2, 64]
    assert part["head.lm_head.kernel"] == [64, 320 // 2]
    assert part["layers.0.input_layernorm.scale"] == [64]
    assert found["heads"].endswith("(None, 'model')")


@pytest.mark.parametrize("case", ["4 bits", "float"])
def test_generation_and_perplexity(found, case):
    many, one = found[case]["tokens"]
    assert many == one
    assert found[case]["compiled again"] == []
    many, one = found[case]["perplexity"]
    assert many == pytest.approx(one, rel=1e-5)


def test_experts(found):
    assert found["experts"] < 1e-5


def test_inputs_that_are_rotated_as_the_model_runs(found):
    assert len(found["rotated"]) == 2
    assert max(found["rotated"]) < 1e-5


def test_axes_of_a_mesh_become_automatic(found):
    assert found["explicit axes"]


def test_what_cannot_be_cut_by_inputs_is_cut_by_outputs_and_said(found):
    (said,) = found["3 bits"]["warnings"]
    assert said.startswith("layers.*.self_attn.o_proj.kernel is cut by P")
    assert "as parts of 16 inputs would cut groups of 32 (1 of them)." in said
    for case in ("2 bits", "4 bits", "8 bits", "float"):
        assert found[case]["warnings"] == []
    assert len(found["fallbacks"]["order"]) == 2
    assert all("in another order than their groups" in note for note in found["fallbacks"]["order"])
    everywhere = [note.split()[0] for note in found["fallbacks"]["odd"] if "on every device" in note]
    attention = [f"layers.*.self_attn.{name}_proj.kernel" for name in "koqv"]
    assert sorted(everywhere) == ["embed.embedding", "head.lm_head.kernel", *attention]


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "axis": "names the mesh axis 'tensor', but the mesh has ['model']",
        "pairs": "rules must be pairs of a regex and a jax.sharding.PartitionSpec, but one is 'mlp'",
        "regex": "'(' is not a regular expression",
        "groups": "parts of 16 inputs would cut groups of 32. Give it another rule",
        "words": "parts of 16 inputs would cut packed words (32 inputs at 3 bits)",
        "two axes": "a packed weight is cut along one of its axes",
        "order": "its inputs are in another order than their groups",
        "devices": "an axis of 60 cannot be cut into 8 equal parts",
        "no axis": "the mesh has the axes ['a', 'b']: call the one that cuts weights 'model', or give rules",
        "no mesh": "give mesh too",
        "both": "sharding and mesh both say where arrays go",
        "evaluated on devices": "the parameters are cut over devices",
        "evaluated by pmap": "the parameters are cut over devices",
        "compared": "the models are on different devices: load both with one mesh",
        "saved": "prepared to run here: save the model it was prepared from",
    }.items(),
)
def test_refusals(found, call, message):
    assert message in found["refusals"][call]


def test_commands(found):
    cli = found["cli"]
    evaluated = json.loads(cli["eval"])
    assert (evaluated["devices"], evaluated["parallel"]) == (2, "tensor")
    assert evaluated["perplexity"] == pytest.approx(cli["perplexity"], rel=1e-5)
    assert json.loads(cli["adapted"])["perplexity"] == pytest.approx(cli["adapted perplexity"], rel=1e-5)
    assert cli["adapted perplexity"] != pytest.approx(cli["perplexity"], rel=1e-2)
    assert cli["generate"] == cli["text"] + "\n"
    assert "error: --tensor-parallel cuts the model, --devices" in cli["and devices"]
    assert "error: --tensor-parallel: devices=9 is more than the 8 cpu devices" in cli["too many"]
