"""The same weights, whose zero points can move."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_quantization import BATCHES, float_model

from gptq_jax.hooks.nnx import kernel_of
from gptq_jax.methods import fractional_zeros, gptq, qep, rtn
from gptq_jax.pipeline import quantize
from gptq_jax.spec import QuantSpec
from gptq_jax.tuning import block_tuning

WEIGHT = jnp.asarray(np.random.default_rng(0).standard_normal((50, 6)), jnp.float32)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_same_weight(bits):
    spec = QuantSpec(bits=bits, group_size=24, symmetric=False, scale_dtype="float16")
    plain, found = (method.solve(WEIGHT, method.init(50, 6), spec) for method in (rtn(), fractional_zeros(rtn())))
    assert found.zeros.dtype == jnp.float16
    np.testing.assert_array_equal(found.dequantize(), plain.dequantize())
    assert found.nbytes == plain.nbytes + plain.zeros.size


def test_a_symmetric_grid_stays_as_it_is():
    spec = QuantSpec(bits=3, group_size=24)
    assert fractional_zeros(rtn()).solve(WEIGHT, (), spec).zeros is None


def test_around_any_method_and_named():
    assert fractional_zeros(gptq()) is fractional_zeros(gptq())
    assert fractional_zeros(qep()).needs_float_inputs
    assert fractional_zeros(qep()).all_settings["fractional_zeros"] is True


def test_tuning_moves_them_and_gains_by_it():
    spec = QuantSpec(bits=2, group_size=24, symmetric=False)
    tuning = block_tuning(epochs=4)
    whole, report = quantize(float_model(layers=1), BATCHES, spec, rtn()._replace(tuning=tuning))
    moved, better = quantize(float_model(layers=1), BATCHES, spec, fractional_zeros(rtn())._replace(tuning=tuning))
    zeros = np.asarray(kernel_of(moved.params["layers"][0], "mlp.up_proj").zeros, np.float32)
    assert np.abs(zeros - np.round(zeros)).max() > 0.01
    assert better.tuned.before == pytest.approx(report.tuned.before)
    assert better.tuned.after < 0.97 * report.tuned.after
    assert kernel_of(whole.params["layers"][0], "mlp.up_proj").zeros.dtype == jnp.uint8
