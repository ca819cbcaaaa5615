import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quantize_child

HERE = Path(__file__).resolve().parents[1]
CASES = [f"{name} on {count}" for name, (_, _, counts) in quantize_child.MODELS.items() for count in counts]


@pytest.fixture(scope="module")
def on_eight_devices():
    """What quantize_child.py computed in a process with eight CPU devices."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "quantize_child.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=580)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_many_devices_quantize_as_one_does(on_eight_devices, case):
    """Batches with padding that the devices do not divide: sums are added in the order of the batches."""
    same, loss, same_tokens = on_eight_devices[case]
    assert same >= 0.999
    assert loss == pytest.approx(1, abs=1e-4)
    assert same_tokens
