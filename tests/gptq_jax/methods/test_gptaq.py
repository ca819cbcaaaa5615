"""GPTAQ against the paper's loop over columns in float64."""

import gptq_numpy as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from drifting_inputs import drifting

from gptq_jax.methods import gptaq, gptq
from gptq_jax.methods.gptaq import GPTAQStats, _order_of_inputs, shift
from gptq_jax.spec import QuantSpec

LAYER = drifting()
SPEC = QuantSpec(bits=3, group_size=64, symmetric=False)


def paper(layer, *, alpha, order, times):
    """The target of the shifted weight, its Hessian, and the weight of the paper's Algorithm 1, minmax static groups.

    Args:
        layer: inputs and weight.
        alpha: of P.
        order: "natural" or "activation".
        times: what P is multiplied by: "original" weights, or "current" ones, as the authors' code has it in a block.
    """
    x, x_float = layer.x.astype(np.float64), layer.x_float.astype(np.float64)
    hessian, cross = x.T @ x, (x_float - x).T @ x
    turn = np.arange(150) if order == "natural" else np.argsort(-np.diag(hessian), kind="stable")
    permuted = hessian[np.ix_(turn, turn)] + 0.01 * np.diag(hessian).mean() * np.eye(150)
    inverse_factor = np.linalg.cholesky(np.linalg.inv(permuted)).T
    p = alpha * np.triu(cross[np.ix_(turn, turn)] @ inverse_factor.T, 1) @ inverse_factor

    back = np.argsort(turn)
    original = layer.weight.astype(np.float64)[turn]
    target = (original + p.T @ original)[back]
    grids = [oracle.minmax_grid(target[start : start + 64], 3, False) for start in range(0, 150, 64)]
    weight, quantized = original.copy(), np.zeros_like(original)
    safe = np.ones(weight.shape[1], bool)
    for j in range(150):
        scale, zero = grids[turn[j] // 64]
        exact = weight[j] / scale
        safe[np.abs(exact - np.floor(exact) - 0.5) < 2e-4] = False
        quantized[j] = (np.clip(np.round(exact) + zero, 0, 7) - zero) * scale
        error = (weight[j] - quantized[j]) / inverse_factor[j, j]
        added = original[j] if times == "original" else weight[j].copy()
        weight[j:] -= np.outer(inverse_factor[j, j:], error)
        weight[j + 1 :] += np.outer(p[j, j + 1 :], added)
    return target, hessian, quantized[back], safe


@pytest.mark.parametrize(("order", "alpha"), [("natural", 1.0), ("activation", 0.25)])
def test_losses_equal_the_papers_in_float64(order, alpha):
    target, hessian, expected, safe = paper(LAYER, alpha=alpha, order=order, times="original")
    tensor = LAYER.solve(gptaq(alpha=alpha, order=order, grid="minmax"), SPEC)
    assert safe.sum() >= 2, "the oracle compares too few columns"
    np.testing.assert_allclose(
        oracle.column_losses(target, tensor.dequantize(), hessian)[safe],
        oracle.column_losses(target, expected, hessian)[safe],
        rtol=1e-3,
    )


def test_original_weights_in_place_of_current_ones_change_little():
    """What is known beforehand differs from the authors' code by the product of two errors, and is what is wanted."""
    ours, theirs = (
        LAYER.error(paper(LAYER, alpha=0.25, order="activation", times=times)[2]) for times in ("original", "current")
    )
    assert 0.95 * theirs < ours < theirs


def test_outputs_are_nearer_to_the_float_models():
    without, quarter, whole = (
        LAYER.error(LAYER.solve(method, SPEC).dequantize()) for method in (gptq(), gptaq(), gptaq(alpha=1.0))
    )
    assert whole < quarter < without


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
def test_inputs_are_shifted_in_the_order_they_are_solved_in(order):
    """A ragged last group too, whose padding must not disturb the order."""
    hessian = np.zeros((150, 150), np.float32)
    drift = np.abs(np.random.default_rng(1).normal(size=(150, 150))).astype(np.float32)
    diagonal = np.random.default_rng(2).permutation(150).astype(np.float32) + 1
    np.fill_diagonal(hessian, diagonal)
    turn = _order_of_inputs(jnp.asarray(diagonal), order, SPEC)
    stats = GPTAQStats(jnp.asarray(hessian), jnp.asarray(drift))
    shifted = np.asarray(shift(jnp.ones((150, 1)), stats, turn, 1.0, 0.0))[:, 0] - 1
    if order == "group":  # of 64, 64 and 22 inputs
        groups = sorted(np.split(np.arange(150), [64, 128]), key=lambda rows: -diagonal[rows].max())
        expected_turn = np.concatenate([rows[np.argsort(-diagonal[rows])] for rows in groups])
    else:
        expected_turn = np.arange(150) if order == "natural" else np.argsort(-diagonal)
    # With independent inputs, an input takes from each one before it what they share: drift over its own strength.
    expected = [drift[j, expected_turn[:k]].sum() / diagonal[j] for k, j in enumerate(expected_turn)]
    np.testing.assert_allclose(shifted[expected_turn], expected, rtol=1e-4, atol=1e-5)


def test_options_are_checked():
    assert gptaq(alpha=0.5) is gptaq(alpha=0.5)
    with pytest.raises(ValueError, match="alpha=-1"):
        gptaq(alpha=-1.0)
    with pytest.raises(ValueError, match="order='random'"):
        gptaq(order="random")
