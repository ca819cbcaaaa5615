import json

import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import build
from export_models import CONFIG, TOKENS, packed_model
from safetensors.numpy import load_file

from gptq_jax import QuantSpec, load
from gptq_jax.storage.export import export


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("spec", [QuantSpec(group_size=32), QuantSpec(bits=3, group_size=40, symmetric=False)])
def test_weights_are_those_of_the_codes(tmp_path, spec, dtype):
    model, weights = packed_model(spec, ordered=spec.symmetric)
    export(model, tmp_path / "out", format="float", dtype=dtype)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert len(weights) == 7
    for layer, weight in weights.items():
        expected = weight.astype(np.float32).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(stored[f"model.{layer}.weight"], expected.T)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_float_model_comes_back_whole(tmp_path):
    model = build({**CONFIG, "attention_bias": True})
    export(model, tmp_path / "out", format="float", dtype="float32")
    np.testing.assert_array_equal(load(tmp_path / "out")(TOKENS), model(TOKENS))
