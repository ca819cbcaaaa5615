import json
import os
import subprocess
import sys
from pathlib import Path

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import parallel_child
import pytest
from decoder_models import TEXT, build, write_directory

from gptq_jax.evaluate import perplexity
from gptq_jax.parallel import PARALLEL, DataParallel, choose_devices, make_mesh

MODEL = build({**decoder_cases.CASES["tied_gqa"], "num_hidden_layers": 1})
TOKENS = np.arange(80, dtype=np.int32)
HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    """What parallel_child.py computed in a process with four CPU devices."""
    config = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 1}
    model = tmp_path_factory.mktemp("models") / "tiny"
    write_directory(model, config)
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, str(HERE / "parallel_child.py"), str(model), str(text)]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", parallel_child.CASES, ids=str)
def test_many_devices_find_what_one_does(on_four_devices, case):
    one, many = on_four_devices["one"], on_four_devices["many"][str(case)]
    assert one[3] > 0
    assert many == one  # to the last bit, since each device has as many windows at a time


def test_other_batches_change_the_last_digits_only(on_four_devices):
    assert on_four_devices["few windows"] == pytest.approx(on_four_devices["one"][0], rel=1e-6)


def test_parameters_that_are_cut_stay_where_they_are(on_four_devices):
    assert on_four_devices["cut stays"]
    assert on_four_devices["cut"] == pytest.approx(on_four_devices["one"][2], rel=1e-6)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_second_evaluation_compiles_nothing(on_four_devices, parallel):
    assert on_four_devices[f"compiled again by {parallel}"] == []


def test_the_command_uses_devices(on_four_devices):
    one = json.loads(on_four_devices["eval 1"])
    pmap = json.loads(on_four_devices["eval 4 --parallel pmap"])
    assert (one["devices"], one["parallel"]) == (1, "jit")
    assert (pmap["devices"], pmap["parallel"]) == (4, "pmap")
    assert pmap["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)


def test_more_devices_than_there_are(on_four_devices):
    assert (
        "error: devices=5 is more than the 4 cpu devices of this process: use at most 4" in (on_four_devices["eval 5"])
    )


@pytest.mark.parametrize("parallel", PARALLEL)
def test_rows_go_out_and_come_back(parallel):
    where = DataParallel(make_mesh(choose_devices(1)), parallel)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    x = where.run(jnp.add, params=jnp.ones((1, 1)), batches=(where.shard(rows),))
    np.testing.assert_array_equal(where.gather(x), rows + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices=0 must be positive"),
        ({"devices": -2}, "devices=-2 must be positive"),
        ({"devices": []}, "must be at least one device"),
        ({"devices": jax.devices()[:1] * 2}, "and none twice"),
        ({"devices": 1000}, r"devices=1000 is more than the \d+ cpu devices? of this process: use at most \d+, or set"),
        ({"parallel": "threads"}, "parallel='threads' is not supported: use jit or pmap"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, TOKENS, length=8, **options)
