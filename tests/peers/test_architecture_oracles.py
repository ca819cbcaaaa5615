"""The committed oracles of all architectures are what transformers makes of them today."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import architecture_cases as cases
import numpy as np
import pytest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
SCRIPT = Path(cases.__file__).parent / "oracles" / "make_architecture_oracles.py"


def test_transformers_has_the_same_logits(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch: tests/peers/requirements-exports.txt lists what is needed")
    child = [sys.executable, str(SCRIPT), str(tmp_path)]
    result = subprocess.run(child, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.load(tmp_path / "logits.npz")
    for name in cases.CONFIGS:
        made = json.loads((tmp_path / f"{name}.json").read_text())
        assert made["tensors"] == cases.oracle(name)["tensors"], name
        assert made["config"]["model_type"] == cases.CONFIGS[name]["model_type"]
        np.testing.assert_allclose(found[name], cases.oracle(name)["logits"], rtol=1e-4, atol=1e-4, err_msg=name)
        real = cases.mask()
        np.testing.assert_allclose(
            found[f"{name}.padded"][real], cases.oracle(name)["padded"][real], rtol=1e-4, atol=1e-4, err_msg=name
        )
