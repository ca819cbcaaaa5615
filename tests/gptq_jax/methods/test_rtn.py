import jax.numpy as jnp
import numpy as np
import pytest
from gptq_numpy import minmax_grid

from gptq_jax import grids
from gptq_jax.methods.rtn import round_to_grid, round_to_nearest, rtn
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import validate

WEIGHT = np.random.default_rng(0).standard_normal((72, 10)).astype(np.float32)


@pytest.mark.parametrize("group_size", [-1, 32, 72, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_numpys_rounding(bits, symmetric, group_size):
    tensor = round_to_nearest(jnp.asarray(WEIGHT), QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric))
    validate(tensor)
    rows = 72 if group_size == -1 else min(group_size, 72)
    expected, steps = [], []
    for start in range(0, 72, rows):
        group = WEIGHT[start : start + rows].astype(np.float64)
        scale, zero = minmax_grid(group, bits, symmetric)
        expected.append((np.clip(np.round(group / scale) + zero, 0, 2**bits - 1) - zero) * scale)
        steps.append(np.broadcast_to(scale, group.shape))
    difference = np.abs(np.asarray(tensor.dequantize()) - np.concatenate(expected))
    off = difference > 1e-5
    # A weight at half a code, as the symmetric grid makes of its largest, may be rounded to either side.
    assert off.mean() < 0.05
    np.testing.assert_allclose(difference[off], np.concatenate(steps)[off], rtol=1e-4)


def test_zeros_of_the_last_groups_padding_change_nothing():
    short = round_to_nearest(jnp.asarray(WEIGHT), QuantSpec(group_size=32, symmetric=False))
    last = round_to_nearest(jnp.asarray(WEIGHT[64:]), QuantSpec(group_size=-1, symmetric=False))
    np.testing.assert_array_equal(short.dequantize()[64:], last.dequantize())


def test_a_given_grid_is_used_as_it_is():
    spec = QuantSpec(bits=4, group_size=36)
    grid = grids.Grid(jnp.full((2, 10), 0.5), jnp.full((2, 10), 8.0))
    tensor = round_to_grid(jnp.asarray(WEIGHT), grid, spec)
    np.testing.assert_array_equal(tensor.dequantize(), np.clip(np.round(WEIGHT / 0.5), -8, 7) * 0.5)


def test_mse_grid_is_nearer_to_the_weights():
    spec = QuantSpec(bits=3, group_size=-1)

    def error(grid):
        tensor = round_to_nearest(jnp.asarray(WEIGHT), spec, grid=grid)
        return float(np.sum(np.abs(WEIGHT - np.asarray(tensor.dequantize())) ** 2.4))

    assert error("mse") < 0.9 * error("minmax")


def test_a_grid_that_needs_a_hessian_is_refused():
    with pytest.raises(ValueError, match="grid='ldl' does not go with rounding to nearest"):
        rtn(grid="ldl")


def test_the_same_options_give_the_same_functions():
    assert rtn() is rtn()
    assert rtn(grid="mse").solve is not rtn().solve
