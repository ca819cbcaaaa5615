"""QEP against the paper's closed form in float64, solved by the float64 GPTQ."""

import gptq_numpy as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from drifting_inputs import drifting

from gptq_jax.methods import coordinate_descent, gptaq, gptq, qep, rtn
from gptq_jax.methods.qep import correct
from gptq_jax.spec import QuantSpec

LAYER = drifting()
SPEC = QuantSpec(bits=3, group_size=64, symmetric=False)


def corrected(layer, alpha, damping=0.01):
    """W + alpha (H + damping)^-1 (C - H) W, with C = Xq^T X."""
    x, x_float = layer.x.astype(np.float64), layer.x_float.astype(np.float64)
    hessian = x.T @ x
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    return layer.weight + alpha * np.linalg.inv(damped) @ (x.T @ x_float - hessian) @ layer.weight, hessian


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_corrected_weight_is_the_papers(alpha):
    target, _ = corrected(LAYER, alpha)
    stats = LAYER.stats(qep())
    found = correct(jnp.asarray(LAYER.weight), stats.solver, stats.drift, alpha, 0.01)
    np.testing.assert_allclose(found, target, atol=2e-4)
    assert np.abs(target - LAYER.weight).max() > 0.1


def test_losses_equal_those_of_a_float64_solver():
    target, hessian = corrected(LAYER, 0.5)
    expected, safe = oracle.gptq(
        target, hessian, bits=3, group_size=64, symmetric=False, order="activation", static_groups=True, grid="ldl"
    )
    tensor = LAYER.solve(qep(), SPEC)
    assert safe.sum() >= 2, "the oracle compares too few columns"
    np.testing.assert_allclose(
        oracle.column_losses(target, tensor.dequantize(), hessian)[safe],
        oracle.column_losses(target, expected, hessian)[safe],
        rtol=1e-3,
    )


@pytest.mark.parametrize("solver", [gptq(), rtn()], ids=["gptq", "rtn"])
def test_outputs_are_nearer_to_the_float_models(solver):
    without, half, whole = (
        LAYER.error(LAYER.solve(method, SPEC).dequantize()) for method in (solver, qep(solver), qep(solver, alpha=1.0))
    )
    assert whole < half < 0.95 * without


def test_inputs_that_have_not_drifted_are_solved_as_before():
    still = LAYER._replace(x_float=LAYER.x)
    np.testing.assert_array_equal(still.solve(qep(), SPEC).codes, still.solve(gptq(), SPEC).codes)


def test_any_solver_takes_the_corrected_weight():
    target, _ = corrected(LAYER, 1.0)
    rounded, expected = (
        LAYER.solve(qep(rtn(), alpha=1.0), SPEC),
        rtn().solve(jnp.asarray(target, jnp.float32), (), SPEC),
    )
    assert np.mean(np.isclose(rounded.dequantize(), expected.dequantize(), atol=1e-3)) > 0.99
    improved = LAYER.solve(qep(coordinate_descent()), SPEC)
    assert LAYER.error(improved.dequantize()) < LAYER.error(LAYER.solve(qep(), SPEC).dequantize())


def test_a_hessian_that_cannot_be_factored_corrects_nothing():
    weight, hessian = LAYER.weight, np.eye(150, dtype=np.float32)
    hessian[5, 6] = hessian[6, 5] = 1e6
    drift = np.ones((150, 150), np.float32)
    np.testing.assert_array_equal(correct(*map(jnp.asarray, (weight, hessian, drift)), 1.0, 0.01), weight)


def test_options_say_what_was_done_and_refuse_what_cannot_be():
    method = qep(gptq(order="natural"), alpha=0.75)
    assert method is qep(gptq(order="natural"), alpha=0.75)
    assert {"solver": "gptq", "order": "natural", "alpha": 0.75}.items() <= dict(method.settings).items()
    with pytest.raises(ValueError, match="alpha=2"):
        qep(alpha=2.0)
    with pytest.raises(ValueError, match="'gptaq' makes up for earlier layers itself"):
        qep(gptaq())
