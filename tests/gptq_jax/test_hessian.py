import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.hessian import accumulate, factorize, output_energy

X = np.random.default_rng(0).standard_normal((200, 24)).astype(np.float32)


def test_accumulate_is_the_sum_over_batches():
    hessian = jnp.zeros((24, 24))
    for part in np.split(X, 4):
        hessian = accumulate(hessian, jnp.asarray(part))
    exact = X.astype(np.float64).T @ X.astype(np.float64)
    np.testing.assert_allclose(hessian, exact, rtol=1e-5, atol=1e-4)


def test_accumulate_widens_bfloat16_first():
    narrow = jnp.asarray(X, jnp.bfloat16)
    wide = np.asarray(narrow.astype(jnp.float32), np.float64)
    hessian = accumulate(jnp.zeros((24, 24)), narrow)
    assert hessian.dtype == jnp.float32
    np.testing.assert_allclose(hessian, wide.T @ wide, rtol=1e-5, atol=1e-4)


def test_the_factor_multiplies_to_the_damped_hessian():
    hessian = X.T @ X
    factor = factorize(jnp.asarray(hessian), 0.01, jnp.float32(np.diag(hessian).mean()))
    upper = np.asarray(factor.upper, np.float64)
    np.testing.assert_array_equal(upper, np.triu(upper))
    expected = hessian + 0.01 * np.diag(hessian).mean() * np.eye(24)
    np.testing.assert_allclose(upper @ upper.T, expected, rtol=1e-4, atol=1e-3)
    assert bool(factor.succeeded)
    assert float(factor.damping) == pytest.approx(0.01)


def test_dead_inputs_get_a_diagonal_of_one():
    inputs = X.copy()
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs
    factor = factorize(jnp.asarray(hessian), 0.0, jnp.float32(np.diag(hessian).mean()))
    product = np.asarray(factor.upper @ factor.upper.T)
    assert product[5, 5] == pytest.approx(1.0)
    assert bool(factor.succeeded)


def test_damping_is_raised_until_a_singular_hessian_can_be_factored():
    few = X[:3]
    hessian = few.T @ few - 1e-3 * np.eye(24, dtype=np.float32)  # a little below semidefinite
    factor = factorize(jnp.asarray(hessian), 0.0, jnp.float32(np.diag(hessian).mean()))
    assert bool(factor.succeeded)
    assert 1e-6 < float(factor.damping) < 0.1
    least = float(factor.damping) / 10 * np.diag(hessian).mean()
    assert np.linalg.eigvalsh(hessian + least * np.eye(24)).min() < 1e-4, "less damping would have done"


def test_a_hopeless_hessian_ends_at_full_damping_with_the_identity():
    hessian = np.eye(8, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 50.0
    factor = factorize(jnp.asarray(hessian), 0.01, jnp.float32(1))
    assert not bool(factor.succeeded)
    assert float(factor.damping) == 1.0
    np.testing.assert_array_equal(factor.upper, np.eye(8))


def test_output_energy_is_the_squared_output():
    error = np.random.default_rng(1).standard_normal((24, 5)).astype(np.float32)
    energy = output_energy(jnp.asarray(error), jnp.asarray(X.T @ X))
    np.testing.assert_allclose(energy, ((X.astype(np.float64) @ error) ** 2).sum(0), rtol=1e-4)
