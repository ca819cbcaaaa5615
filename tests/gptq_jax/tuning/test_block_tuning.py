"""One linear layer as a block: slopes of scales and zero points by hand, in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_block import D_IN, D_OUT, TOKENS, Linear, problem

from gptq_jax.grids import Grid
from gptq_jax.methods.base import assemble
from gptq_jax.spec import QuantSpec
from gptq_jax.tuning import block_tuning
from gptq_jax.tuning.fit import Example, tune


def slopes_by_hand(tensor, groups, scale, zero, example):
    """Of the mean over real tokens of |y - t|^2 / |t|^2, by log scale and by zero point; and the error itself."""
    codes = np.round(np.asarray(tensor.dequantize(), np.float64) / np.asarray(tensor.scales)[groups])
    steps = (
        codes
        + np.asarray(2 ** (tensor.spec.bits - 1) if tensor.zeros is None else tensor.zeros, np.float64)[
            ... if tensor.zeros is None else groups
        ]
    )
    weight = (steps - zero[groups]) * scale[groups]
    x, target = np.asarray(example.state[0], np.float64), np.asarray(example.target[0], np.float64)
    real = np.asarray(example.mask[0])
    difference = (x @ weight - target) * real[:, None]
    energy = np.sum(target**2, axis=1, keepdims=True)
    by_weight = x.T @ (2 * difference / energy) / real.sum()
    by_scale, by_zero = np.zeros_like(scale), np.zeros_like(scale)
    for row, group in enumerate(groups):
        by_scale[group] += by_weight[row] * weight[row]
        by_zero[group] -= by_weight[row] * scale[group]
    return by_scale, by_zero, np.sum(difference**2 / energy) / real.sum()


@pytest.mark.parametrize(("symmetric", "permuted"), [(True, False), (False, True)])
def test_a_step_is_the_slope_by_hand(symmetric, permuted):
    spec = QuantSpec(bits=3, group_size=8, symmetric=symmetric, scale_dtype="float32")
    groups = np.random.default_rng(3).permutation(np.arange(D_IN) // 8) if permuted else np.arange(D_IN) // 8
    params, weights, examples = problem(spec, groups if permuted else None)
    tensor = params["up"]["kernel"]
    tuning = block_tuning(epochs=1)._replace(optimizer=lambda steps: optax.sgd(0.1))
    tuned = tune(tuning, Linear(), params, weights, examples[:1])
    middle = np.full(tensor.scales.shape, 2.0 ** (spec.bits - 1))
    zero = middle if symmetric else np.asarray(tensor.zeros, np.float64)
    scale = np.asarray(tensor.scales, np.float64)
    by_scale, _, before = slopes_by_hand(tensor, groups, scale, zero, examples[0])
    stepped = scale * np.exp(-0.1 * by_scale)
    *_, after = slopes_by_hand(tensor, groups, stepped, zero, examples[0])
    assert tuned.before == pytest.approx(before, rel=1e-4)
    assert tuned.after == pytest.approx(after, rel=1e-4)
    assert after < before
    np.testing.assert_allclose(tuned.tensors["up"].scales, stepped, rtol=1e-5)
    np.testing.assert_array_equal(tuned.tensors["up"].codes, tensor.codes)
    if not symmetric:
        np.testing.assert_array_equal(tuned.tensors["up"].zeros, tensor.zeros)


def test_fractional_zero_points_move():
    spec = QuantSpec(bits=3, group_size=8, symmetric=False, scale_dtype="float32")
    params, weights, examples = problem(spec)
    tensor = params["up"]["kernel"]
    tensor = replace(tensor, zeros=tensor.zeros.astype(jnp.float32) + 0.25)
    tuning = block_tuning(epochs=1)._replace(optimizer=lambda steps: optax.sgd(0.1))
    tuned = tune(tuning, Linear(), {"up": {"kernel": tensor}}, weights, examples[:1])
    groups, zero = np.arange(D_IN) // 8, np.asarray(tensor.zeros, np.float64)
    scale = np.asarray(tensor.scales, np.float64)
    integral = replace(tensor, zeros=params["up"]["kernel"].zeros)
    by_scale, by_zero, _ = slopes_by_hand(integral, groups, scale, zero, examples[0])
    np.testing.assert_allclose(tuned.tensors["up"].scales, scale * np.exp(-0.1 * by_scale), rtol=1e-5)
    np.testing.assert_allclose(tuned.tensors["up"].zeros, zero - 0.1 * by_zero, rtol=1e-5)
    assert tuned.tensors["up"].zeros.dtype == tensor.zeros.dtype


def test_adam_with_a_cosine_by_hand():
    """Its first step is of length `rate` whatever the slope; the second has gone half way down the cosine."""
    spec = QuantSpec(bits=4, group_size=-1, scale_dtype="float32")
    params, weights, examples = problem(spec)
    examples = [examples[0], examples[0]]
    tensor, rate = params["up"]["kernel"], 1e-3
    tuned = tune(block_tuning(epochs=1, rate=rate), Linear(), params, weights, examples)
    groups, zero = np.zeros(D_IN, int), np.full(tensor.scales.shape, 8.0)
    scale = np.asarray(tensor.scales, np.float64)
    log, first, second = np.zeros_like(scale), 0.0, 0.0
    for step, now in ((1, rate), (2, rate / 2)):
        slope, *_ = slopes_by_hand(tensor, groups, scale * np.exp(log), zero, examples[0])
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        log -= now * (first / (1 - 0.9**step)) / np.sqrt(second / (1 - 0.999**step))
    np.testing.assert_allclose(tuned.tensors["up"].scales, scale * np.exp(log), rtol=1e-5)


def test_scales_are_rounded_as_they_are_stored():
    spec = QuantSpec(bits=2, group_size=8, scale_dtype="float16")
    params, weights, examples = problem(spec)
    tuned = tune(block_tuning(rate=0.05), Linear(), params, weights, examples)
    tensor = tuned.tensors["up"]
    assert tensor.scales.dtype == jnp.float16
    found = []
    for example in examples:
        target = np.asarray(example.target[0, :6])
        error = np.asarray(example.state[0, :6]) @ np.asarray(tensor.dequantize()) - target
        found.append(np.sum(error**2 / np.sum(target**2, axis=1, keepdims=True)))
    assert tuned.after == pytest.approx(sum(found) / 12, rel=1e-4)
    assert tuned.after < 0.9 * tuned.before


def test_what_does_not_help_is_thrown_away():
    """The grid that is there already is the best."""
    spec = QuantSpec(bits=8, group_size=-1, scale_dtype="float32")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (D_IN, D_OUT))
    grid = Grid(jnp.full((1, D_OUT), 0.25), jnp.full((1, D_OUT), 128.0))
    tensor = assemble(jnp.asarray(codes), grid, spec)
    state = rng.standard_normal((1, TOKENS, D_IN)).astype(np.float32)
    target = state @ np.asarray(tensor.dequantize()) + rng.standard_normal((1, TOKENS, D_OUT)).astype(np.float32) * 1e-3
    tuned = tune(
        block_tuning(rate=3.0), Linear(), {"up": {"kernel": tensor}}, {"up": tensor.dequantize()},
        [Example(jnp.asarray(state), jnp.asarray(target), None)],
    )  # fmt: skip
    assert tuned.after == tuned.before
    np.testing.assert_array_equal(tuned.tensors["up"].scales, tensor.scales)


@pytest.mark.parametrize(("options", "message"), [({"epochs": 0}, "epochs=0"), ({"rate": 0.0}, r"rate=0\.0")])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        block_tuning(**options)
