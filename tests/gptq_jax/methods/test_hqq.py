"""HQQ against the authors' iteration in float64."""

from dataclasses import replace

import gptq_numpy as oracle
import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.methods import hqq, rtn
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import validate

WEIGHT = (0.05 * np.random.default_rng(0).standard_t(5, (150, 40))).astype(np.float32)


def half_quadratic(group, bits, symmetric, norm=0.7, iterations=20):
    """The least error sum |e|^p that the iteration comes by, and which columns never come near a tie in rounding."""
    scale, zero = oracle.minmax_grid(group, bits, symmetric)
    seen, beta, safe = [], 10.0, np.ones(group.shape[1], bool)
    for _ in range(iterations + 1):
        exact = group / scale + zero
        tie = np.abs(exact - np.floor(exact) - 0.5) < 2e-5
        safe &= ~np.any(tie & (exact > 0) & (exact < 2**bits - 1), axis=0)
        codes = np.clip(np.round(exact), 0, 2**bits - 1)
        found = (codes - zero) * scale
        error = group - found
        seen.append(np.sum(np.abs(error) ** norm, axis=0))
        with np.errstate(divide="ignore"):
            wanted = group - np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** (norm - 1) / beta, 0)
        if symmetric:
            scale = np.sum((codes - zero) * wanted, axis=0) / np.sum((codes - zero) ** 2, axis=0)
        else:
            zero = np.mean(codes - wanted / scale, axis=0)
        beta *= 1.01
    return np.min(seen, axis=0), safe


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_those_of_the_iteration(bits, symmetric):
    """Groups of 64, the last of 22, whose padding must not draw the zero points."""
    spec = QuantSpec(bits=bits, group_size=64, symmetric=symmetric)
    tensor = hqq().solve(jnp.asarray(WEIGHT), (), spec)
    validate(tensor)
    error = np.abs(WEIGHT - np.asarray(tensor.dequantize(), np.float64)) ** 0.7
    for start in (0, 64, 128):
        expected, safe = half_quadratic(WEIGHT[start : start + 64].astype(np.float64), bits, symmetric)
        assert safe.sum() >= 2, "the oracle compares too few columns"
        np.testing.assert_allclose(error[start : start + 64].sum(0)[safe], expected[safe], rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_no_column_is_worse_than_its_start_by_its_own_norm(grid, symmetric):
    spec = QuantSpec(bits=3, group_size=50, symmetric=symmetric)

    def losses(method):
        error = WEIGHT - np.asarray(method.solve(jnp.asarray(WEIGHT), (), spec).dequantize())
        return np.sum(np.abs(error) ** 0.7, axis=0)

    fitted, start = losses(hqq(grid)), losses(rtn(grid))
    assert np.all(fitted <= start * (1 + 1e-5))
    assert fitted.sum() < 0.99 * start.sum()


def test_zero_points_are_fractions_in_the_dtype_of_scales():
    spec = QuantSpec(bits=4, group_size=64, symmetric=False, scale_dtype="float16")
    tensor = hqq().solve(jnp.asarray(WEIGHT), (), spec)
    assert tensor.zeros.dtype == jnp.float16
    assert np.any(np.asarray(tensor.zeros) % 1)
    codes_of_float32_zeros = hqq().solve(jnp.asarray(WEIGHT), (), replace(spec, scale_dtype="float32"))
    late = replace(codes_of_float32_zeros, zeros=codes_of_float32_zeros.zeros.astype(jnp.float16))
    error = [float(jnp.sum(jnp.abs(WEIGHT - t.dequantize()) ** 0.7)) for t in (tensor, late)]
    assert error[0] <= 1.001 * error[1]


def test_a_constant_group_is_kept():
    weight = np.zeros((64, 4), np.float32)
    weight[:32] = 0.3
    for symmetric in (True, False):
        found = hqq().solve(jnp.asarray(weight), (), QuantSpec(bits=4, group_size=32, symmetric=symmetric)).dequantize()
        assert bool(jnp.all(jnp.isfinite(found)))
        np.testing.assert_array_equal(found[32:], 0)


def test_options_are_checked():
    assert hqq(norm=0.5) is hqq(norm=0.5)
    for options, message in (
        ({"norm": 2.0}, "norm=2.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"grid": "ldl"}, "ldl"),
    ):
        with pytest.raises(ValueError, match=message):
            hqq(**options)
