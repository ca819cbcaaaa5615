import jax.numpy as jnp
import numpy as np
import pytest
from gptq_numpy import minmax_grid, search_grid

from gptq_jax import grids
from gptq_jax.spec import QuantSpec

GROUP = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_is_that_of_numpy(bits, symmetric):
    grid = grids.minmax(jnp.asarray(GROUP), QuantSpec(bits=bits, symmetric=symmetric))
    scale, zero = minmax_grid(GROUP.astype(np.float64), bits, symmetric)
    np.testing.assert_allclose(grid.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(grid.zero, zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_is_further_than_half_a_step_from_an_asymmetric_grid(bits):
    spec = QuantSpec(bits=bits, symmetric=False)
    grid = grids.minmax(jnp.asarray(GROUP), spec)
    row_grid = grids.Grid(grid.scale[None], grid.zero[None])
    codes = grids.quantize(jnp.asarray(GROUP), row_grid, spec)
    error = np.abs(GROUP - np.asarray(grids.dequantize(codes, row_grid)))
    # The zero point is rounded, which can cost an end of the range another half step.
    assert (error <= 1.001 * np.asarray(grid.scale)).all()
    assert np.median(error / np.asarray(grid.scale)) < 0.3
    assert float(codes.min()) == 0
    assert float(codes.max()) == spec.max_code


@pytest.mark.parametrize(("name", "norm"), [("mse", 2.4), ("ldl", 2.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searches_find_the_best_of_their_candidates(name, norm, symmetric):
    spec = QuantSpec(bits=3, symmetric=symmetric)
    pivots = np.random.default_rng(1).uniform(0.1, 10, len(GROUP)).astype(np.float32)
    importance = np.ones(len(GROUP)) if name == "mse" else pivots
    scale, zero, margin = search_grid(GROUP.astype(np.float64), importance, 3, symmetric, norm)
    grid = grids.fit(name, jnp.asarray(GROUP), jnp.asarray(pivots), spec)
    clear = margin > 1e-4
    assert clear.sum() > 30
    np.testing.assert_allclose(np.asarray(grid.scale)[clear], scale[clear], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(grid.zero)[clear], zero[clear])
    assert (scale < 0.99 * minmax_grid(GROUP, 3, symmetric)[0]).any(), "nothing was clipped"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_those_that_will_be_stored(dtype):
    for name in grids.GRIDS:
        grid = grids.fit(name, jnp.asarray(GROUP), jnp.ones(len(GROUP)), QuantSpec(scale_dtype=dtype))
        np.testing.assert_array_equal(grid.scale, grid.scale.astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("values", [0.0, 1e-12, 1e9])
def test_scales_are_finite_and_positive_at_the_ends_of_a_dtype(values, symmetric):
    spec = QuantSpec(scale_dtype="float16", symmetric=symmetric)
    grid = grids.minmax(jnp.full((8, 3), values, jnp.float32), spec)
    assert bool(jnp.all(jnp.isfinite(grid.scale) & (grid.scale > 0)))
    assert bool(jnp.all((grid.zero >= 0) & (grid.zero <= spec.max_code)))
    row_grid = grids.Grid(grid.scale[None], grid.zero[None])
    assert float(jnp.abs(grids.dequantize(grids.quantize(jnp.zeros((1, 3)), row_grid, spec), row_grid)).max()) == 0


def test_one_sided_groups_hold_zero():
    grid = grids.minmax(jnp.asarray([[1.0, -3.0], [2.0, -1.0]]), QuantSpec(bits=2, symmetric=False))
    np.testing.assert_allclose(grid.scale, [2 / 3, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(grid.zero, [0, 3])


def test_unknown_grid_is_named():
    with pytest.raises(ValueError, match=r"grid='best' is not supported: use one of \['minmax'"):
        grids.fit("best", jnp.ones((2, 2)), jnp.ones(2), QuantSpec())
