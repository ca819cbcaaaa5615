"""Coordinate descent against a float64 loop over inputs, and against what it promises."""

import gptq_numpy as oracle
import numpy as np
import pytest
from drifting_inputs import drifting

from gptq_jax import grids
from gptq_jax.methods import coordinate_descent, gptq, hqq, qep, rtn
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import validate

LAYER = drifting()
HESSIAN = LAYER.x.T.astype(np.float64) @ LAYER.x


def descended(tensor, passes, damping=0.01):
    """The paper's update, one input at a time, each looking at all others."""
    weight = LAYER.weight.astype(np.float64)
    scale, zero = (np.asarray(leaf, np.float64) for leaf in grids.grid_of(tensor))
    group = np.arange(150) // tensor.spec.group_rows(150)
    hessian = HESSIAN + damping * np.diag(HESSIAN).mean() * np.eye(150)
    found, safe = np.asarray(tensor.dequantize(), np.float64), np.ones(40, bool)
    for j in list(range(150)) * passes:
        step, middle = scale[group[j]], zero[group[j]]
        exact = (found[j] + hessian[j] @ (weight - found) / hessian[j, j]) / step + middle
        safe[np.abs(exact - np.floor(exact) - 0.5) < 1e-3] = False
        found[j] = (np.clip(np.round(exact), 0, tensor.spec.max_code) - middle) * step
    return found, safe


@pytest.mark.parametrize("method", [rtn(), hqq()], ids=["rtn", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_those_of_the_loop(method, symmetric):
    spec = QuantSpec(bits=3, group_size=64, symmetric=symmetric)
    expected, safe = descended(LAYER.solve(method, spec), 2)
    tensor = LAYER.solve(coordinate_descent(method, passes=2), spec)
    validate(tensor)
    assert safe.sum() >= 2, "the oracle compares too few columns"
    np.testing.assert_allclose(np.asarray(tensor.dequantize())[:, safe], expected[:, safe], atol=1e-5)


@pytest.mark.parametrize("solver", [gptq(), gptq(static_groups=False, grid="minmax")], ids=["static", "desc_act"])
def test_each_pass_lowers_the_loss(solver):
    spec = QuantSpec(bits=3, group_size=64, symmetric=False)
    methods = [solver, *(coordinate_descent(solver, passes=passes, damping=0.0) for passes in (1, 2, 8))]
    losses = [oracle.proxy_loss(LAYER.weight, LAYER.solve(method, spec).dequantize(), HESSIAN) for method in methods]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.98 * losses[0]


def test_what_it_was_is_said():
    method = coordinate_descent(gptq(), passes=3)
    assert method is coordinate_descent(gptq(), passes=3)
    assert method.name == "gptq"
    assert dict(method.settings)["coordinate_descent"] == 3


def test_refusals():
    with pytest.raises(ValueError, match="passes=0"):
        coordinate_descent(passes=0)
    with pytest.raises(ValueError, match="put coordinate descent inside"):
        coordinate_descent(qep())
