"""The example trains over a packed model, and what it writes is the model it trained."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from export_models import TOKENS, packed_model

import gptq_jax
from gptq_jax import QuantSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "qlora.py"


def test_trains_and_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("qlora", EXAMPLE)
    qlora = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(qlora)
    model, _ = packed_model(QuantSpec(bits=4, group_size=32), tokenizer=True)
    gptq_jax.save(model, tmp_path / "packed")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    arguments = [str(tmp_path / name) for name in ("packed", "text.txt", "out")]
    settings = ["--rank", "4", "--steps", "12", "--length", "24", "--learning-rate", "0.02"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax and users have it
        losses = qlora.main([*arguments, *settings])
    assert losses[-1] < 0.9 * losses[0]

    adapters = gptq_jax.load_lora(tmp_path / "out" / "adapters", model)
    adapted = np.asarray(gptq_jax.with_lora(model, adapters)(TOKENS))
    merged = np.asarray(gptq_jax.load(tmp_path / "out" / "merged")(TOKENS))
    assert np.linalg.norm(merged - adapted) < 1e-2 * np.linalg.norm(adapted)  # it is stored in 16 bits
    assert np.linalg.norm(adapted - np.asarray(model(TOKENS))) > 0.05 * np.linalg.norm(adapted)
