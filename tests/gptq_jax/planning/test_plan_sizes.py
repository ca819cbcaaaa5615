from dataclasses import replace

import decoder_cases
import expert_models
import jax
import pytest
from decoder_models import build
from tiny_quantization import BATCHES, float_model

from gptq_jax.methods import gptq, rtn
from gptq_jax.models.published import PUBLISHED
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.pipeline import quantize
from gptq_jax.planning.sizes import bits_per_weight, float_shapes, has_experts, largest_block, quantized_shapes
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.store import save, tree_bytes

GRIDS = {
    "w4": QuantSpec(bits=4, group_size=16),
    "ragged": QuantSpec(bits=4, group_size=36),  # 48 and 80 inputs: the last group is shorter
    "w3_asymmetric": QuantSpec(bits=3, group_size=20, symmetric=False),
    "w2_column": QuantSpec(bits=2, group_size=-1, symmetric=False),
    "w8_float32": QuantSpec(bits=8, group_size=128, scale_dtype="float32"),
}
# Published counts: the cards of the models on the Hugging Face Hub.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.mark.parametrize(("grid", "dtype"), [*((grid, "float32") for grid in GRIDS), ("ragged", "bfloat16")])
def test_planned_arrays_are_those_that_are_made(grid, dtype):
    model = float_model(layers=1, case="biases", dtype=dtype)
    made, report = quantize(model, BATCHES, GRIDS[grid], rtn())
    planned = quantized_shapes(model.config, SpecRules(default=GRIDS[grid]), dtype)
    assert shapes(planned) == shapes(made.params)
    assert tree_bytes(planned) == tree_bytes(made.params)
    assert tree_bytes(float_shapes(model.config, dtype)) == tree_bytes(model.params)
    assert bits_per_weight(planned) == pytest.approx(report.bits_per_weight)
    assert largest_block(planned) == tree_bytes(made.params["layers"][0])
    assert not has_experts(planned)


def test_gptq_makes_the_same_arrays_as_planned():
    model = float_model(layers=1)
    made, _ = quantize(model, BATCHES, GRIDS["ragged"], gptq())
    assert shapes(quantized_shapes(model.config, SpecRules(default=GRIDS["ragged"]), "float32")) == shapes(made.params)


def test_stacked_experts_are_planned():
    model = expert_models.float_model("mixtral")
    made, _ = quantize(model, expert_models.batches(1), GRIDS["ragged"], rtn())
    planned = quantized_shapes(model.config, SpecRules(default=GRIDS["ragged"]), "float32")
    assert shapes(planned) == shapes(made.params)
    assert has_experts(planned)
    assert has_experts(float_shapes(model.config, "float32"))


def test_rules_are_followed():
    model = float_model()
    rules = SpecRules(default=GRIDS["w4"], skip=("gate",), overrides=((r"0\..*down", (("bits", 8),)),))
    made, _ = quantize(model, BATCHES, rules, rtn())
    assert shapes(quantized_shapes(model.config, rules, "float32")) == shapes(made.params)


def test_the_store_takes_no_more_than_planned(tmp_path):
    config = {**decoder_cases.CASES["untied_mha"], "hidden_size": 192, "intermediate_size": 400, "vocab_size": 256}
    model = build({**config, "num_hidden_layers": 4})
    spec = QuantSpec(bits=8, group_size=36)
    made, _ = quantize(model, BATCHES, spec, rtn())
    save(made, tmp_path / "store")
    planned = tree_bytes(quantized_shapes(model.config, SpecRules(default=spec), "float32"))
    arrays = [file for file in (tmp_path / "store").rglob("*") if file.is_file() and "c" in file.parts]  # zarr's chunks
    # Orbax compresses: by a tenth where codes are as uneven as those of random weights.
    assert 0.9 * planned < sum(file.stat().st_size for file in arrays) < 1.02 * planned


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name):
    config = architecture_from_config(PUBLISHED[name])
    few = float_shapes(replace(config, num_layers=1), "float32")
    block = sum(leaf.size for leaf in jax.tree.leaves(few["layers"]))
    outer = sum(leaf.size for leaf in jax.tree.leaves((few["embed"], few["head"])))
    assert config.num_layers * block + outer == PARAMETERS[name]
