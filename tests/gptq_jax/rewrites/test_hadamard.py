"""Rotated models give the outputs they gave; what cannot be rotated says why."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from architecture_models import float_case
from tiny_quantization import float_model

from gptq_jax.models.registry import architecture_from_config
from gptq_jax.rewrites import hadamard
from gptq_jax.rewrites.hadamard import hadamard_matrix, rotation

TOKENS = np.random.default_rng(0).integers(3, 48, (2, 12), dtype=np.int32)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 48, 60, 576, 896, 960])
def test_hadamard_matrices_are_hadamards(size):
    found = hadamard_matrix(size)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, size * np.eye(size))


@pytest.mark.parametrize("size", [48, 100, 9])
def test_rotations_are_orthogonal_and_differ_by_seed(size):
    """100 and 9 have no Hadamard matrix here: 99 and 49 are no primes."""
    assert (hadamard_matrix(size) is None) == (size != 48)
    np.testing.assert_allclose(rotation(size) @ rotation(size).T, np.eye(size), atol=1e-12)
    assert not np.allclose(rotation(size, 0), rotation(size, 1))


@pytest.mark.parametrize("case", ["tied_gqa", "biases", "head_dim"])
def test_llamas_give_the_same_logits(case):
    check_same(float_model(case=case))


@pytest.mark.parametrize("case", ["gemma", "qwen3moe_mixed", "phi3"])
def test_other_families_give_the_same_logits(case, tmp_path):
    """Gains stored less one and a scaled embedding; experts beside plain blocks; fused layers."""
    check_same(float_case(case, tmp_path))


def check_same(model):
    rotated = hadamard().apply(model, (), None)
    expected, found = model(TOKENS), rotated(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert rotated.config == architecture_from_config(rotated.source)
    assert jax.tree.structure(rotated.params) == jax.tree.structure(rotated.config.abstract_params())
    assert not np.allclose(rotated.params["embed"]["embedding"], model.params["embed"]["embedding"], atol=1e-2)


def test_outliers_of_one_channel_become_small_parts_of_all():
    model = float_model(layers=1)
    block = model.params["layers"][0]
    kernel = block["mlp"]["up_proj"]["kernel"].at[7].mul(50.0)
    block = {**block, "mlp": {**block["mlp"], "up_proj": {"kernel": kernel}}}
    rotated = hadamard().apply(replace(model, params={**model.params, "layers": [block]}), (), None)
    found = np.abs(rotated.params["layers"][0]["mlp"]["up_proj"]["kernel"])
    assert found.max() / found.mean() < 0.3 * float(np.abs(kernel).max() / np.abs(kernel).mean())


@pytest.mark.parametrize(
    ("case", "reason"),
    [("gpt2", "takes away the mean"), ("gemma2", "norms on what is added"), ("opt_350m", "takes away the mean")],
)
def test_what_cannot_be_rotated_says_why(case, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        hadamard().apply(float_case(case, tmp_path), (), None)


def test_a_module_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="not a supplied decoder"):
        hadamard().apply(object(), (), None)
