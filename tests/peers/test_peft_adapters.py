"""Adapters in PEFT, beside a float export of the model they were made for."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from export_models import TOKENS, packed_model

import gptq_jax

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


def test_the_same_logits_in_peft(tmp_path):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("no peft: tests/peers/requirements-exports.txt lists what is needed")
    model, _ = packed_model()
    rng = np.random.default_rng(0)
    adapters = {
        path: replace(added, b=jnp.asarray(rng.normal(size=added.b.shape, scale=0.05), jnp.float32))
        for path, added in gptq_jax.lora(model, 4, targets="q_proj|down_proj", alpha=6.0).items()
    }
    gptq_jax.export(model, tmp_path / "model", format="float", dtype="float32")
    gptq_jax.save_lora(adapters, model, tmp_path / "adapters")
    np.save(tmp_path / "tokens.npy", TOKENS.astype(np.int64))
    child = [sys.executable, Path(__file__).with_name("peft_child.py"), tmp_path]
    result = subprocess.run([*map(str, child)], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = np.load(tmp_path / "logits.npy")
    ours = np.asarray(gptq_jax.with_lora(model, adapters)(TOKENS))
    assert np.linalg.norm(theirs - ours) < 1e-4 * np.linalg.norm(theirs)
    assert np.linalg.norm(ours - np.asarray(model(TOKENS))) > 0.05 * np.linalg.norm(ours)
