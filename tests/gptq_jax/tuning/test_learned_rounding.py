"""SignRound of one linear layer, step by step by hand, in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from linear_block import D_IN, D_OUT, Linear, problem

from gptq_jax.spec import QuantSpec
from gptq_jax.tuning import learned_rounding
from gptq_jax.tuning.fit import tune
from pallas_kernels.packing import unpack

GROUPS = np.arange(D_IN) // 8


def by_hand(weight, tensor, example, steps, clip):
    """Algorithm 1 of the paper on one batch: codes, scales and zeros after so many steps."""
    most = tensor.spec.max_code
    scale0, zero0 = np.asarray(tensor.scales, np.float64), np.asarray(tensor.zeros, np.float64)
    low0, high0 = -zero0 * scale0, (most - zero0) * scale0
    rounding, low, high = np.zeros((D_IN, D_OUT)), np.zeros_like(scale0), np.zeros_like(scale0)
    x, target = (np.asarray(array[0], np.float64) for array in (example.state, example.target))
    real = np.asarray(example.mask[0])
    energy = np.sum(target**2, axis=1, keepdims=True)
    for step in range(steps + 1):
        scale = (high0 * (1 - high) - low0 * (1 - low)) / most
        scale = scale.astype(np.float32).astype(np.float64)
        exact_zero = -low0 * (1 - low) / scale
        zero = np.clip(np.round(exact_zero), 0, most)
        exact = weight / scale[GROUPS] + zero[GROUPS] + rounding
        codes = np.clip(np.round(exact), 0, most)
        if step == steps:
            return codes, scale, zero
        quantized = (codes - zero[GROUPS]) * scale[GROUPS]
        difference = (x @ quantized - target) * real[:, None]
        slope = x.T @ (2 * difference / energy) / real.sum()
        inside = (exact > -0.5) & (exact < most + 0.5)
        by_code = slope * scale[GROUPS] * inside
        rate = (1 - step / steps) / steps
        if clip:
            by_scale, by_zero = np.zeros_like(scale), np.zeros_like(scale)
            for row, group in enumerate(GROUPS):
                # The scale counts where it multiplies and where it divides; the zero point where codes are clipped.
                by_scale[group] += slope[row] * (codes - zero[GROUPS])[row]
                by_scale[group] -= by_code[row] * weight[row] / scale[group] ** 2
                by_zero[group] += by_code[row] - slope[row] * scale[group]
            by_scale += by_zero * low0 * (1 - low) / scale**2
            by_low = by_scale * low0 / most + by_zero * low0 / scale
            high = np.clip(high - rate * np.sign(-by_scale * high0 / most), 0, 0.5)
            low = np.clip(low - rate * np.sign(by_low), 0, 0.5)
        rounding = np.clip(rounding - rate * np.sign(by_code), -0.5, 0.5)


@pytest.mark.parametrize(("seed", "steps", "clip"), [(2, 30, False), (2, 60, True)])
def test_it_is_signround_by_hand(seed, steps, clip):
    spec = QuantSpec(bits=3, group_size=8, symmetric=False, scale_dtype="float32")
    params, weights, examples = problem(spec, seed=seed)
    tensor = params["up"]["kernel"]
    tuned = tune(learned_rounding(epochs=steps, clip=clip), Linear(), params, weights, examples[:1])
    weight = np.asarray(weights["up"], np.float64)
    codes, scale, zero = by_hand(weight, tensor, examples[0], steps, clip)
    found = tuned.tensors["up"]
    assert tuned.after < tuned.before
    np.testing.assert_array_equal(unpack(found.codes, 3, D_IN), codes)
    np.testing.assert_allclose(found.scales, scale, rtol=1e-6)
    np.testing.assert_array_equal(found.zeros, zero)
    assert np.any(codes != np.asarray(unpack(tensor.codes, 3, D_IN)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_begins_at_any_codes_and_moves_by_one_at_most(symmetric):
    """Codes that are not the nearest, as compensation makes them, stay where nothing is learned."""
    spec = QuantSpec(bits=4, group_size=8, symmetric=symmetric, scale_dtype="float32")
    params, weights, _ = problem(spec)
    tensor = params["up"]["kernel"]
    moved_weight = weights["up"] + 2.3 * jnp.repeat(tensor.scales, 8, axis=0)[:D_IN]
    tuning = learned_rounding(clip=False)
    variables = tuning.start(moved_weight, tensor)
    codes, _ = tuning.values(variables, moved_weight, tensor)
    before = np.asarray(unpack(tensor.codes, 4, D_IN), int)
    np.testing.assert_array_equal(codes, before)
    down, up = (
        tuning.values({"rounding": jnp.full((D_IN, D_OUT), half)}, moved_weight, tensor)[0] for half in (-0.5, 0.5)
    )
    np.testing.assert_array_equal(down, before)
    np.testing.assert_array_equal(up, np.minimum(before + 1, 15))


@pytest.mark.parametrize("kind", ["permuted", "fractional"])
def test_other_grids_begin_where_they_are_and_get_better(kind):
    spec = QuantSpec(bits=3, group_size=8, symmetric=False, scale_dtype="float16")
    groups = np.random.default_rng(3).permutation(GROUPS) if kind == "permuted" else None
    params, weights, examples = problem(spec, groups)
    tensor = params["up"]["kernel"]
    if kind == "fractional":
        tensor = replace(tensor, zeros=tensor.zeros.astype(jnp.float16) + jnp.float16(0.25))
    tuning = learned_rounding(epochs=60)
    codes, grid = tuning.values(tuning.start(weights["up"], tensor), weights["up"], tensor)
    np.testing.assert_array_equal(codes, unpack(tensor.codes, 3, D_IN))
    np.testing.assert_allclose(grid.scale, tensor.scales.astype(jnp.float32), rtol=1e-3)
    tuned = tune(tuning, Linear(), {"up": {"kernel": tensor}}, weights, examples)
    assert tuned.after < tuned.before
    found = tuned.tensors["up"]
    assert (found.scales.dtype, found.zeros.dtype) == (
        jnp.float16,
        tensor.zeros.dtype,
    )


def test_no_epochs_are_refused():
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        learned_rounding(epochs=0)
