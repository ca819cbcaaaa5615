"""Scaled models give the outputs they gave; scales are those of the papers; rounding loses less for them."""

import gptq_numpy as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from architecture_models import float_case
from tiny_quantization import BATCHES, float_model

from gptq_jax.calibration import Batch
from gptq_jax.methods import rtn
from gptq_jax.pipeline import quantize
from gptq_jax.rewrites import awq, smooth
from gptq_jax.rewrites.scaling import InputStats, migrate, scaling_groups, search
from gptq_jax.spec import QuantSpec, SpecRules

TOKENS = np.random.default_rng(0).integers(3, 48, (2, 12), dtype=np.int32)
MASK = np.arange(12) >= np.array([[0], [5]])
RULES = SpecRules(default=QuantSpec(bits=3, group_size=16))


@pytest.mark.parametrize(
    ("case", "sources"),
    [
        ("untied_mha", ["attention_norm", "mlp_norm", "value", "up"]),
        ("tied_gqa", ["attention_norm", "mlp_norm", "up"]),
        ("opt", ["attention_norm", "mlp_norm", "value", "up"]),
        ("phi3", ["attention_norm", "mlp_norm", "gate_up"]),
        ("gptj", ["attention_norm", "value"]),
        ("gemma", ["attention_norm", "mlp_norm", "up"]),
        ("mixtral", ["attention_norm"]),
    ],
)
def test_models_give_the_same_logits(case, sources, tmp_path):
    model = float_model(case=case, layers=1) if case in ("untied_mha", "tied_gqa") else float_case(case, tmp_path)
    config = model.config.of_kind(model.config.layer_kind(0))
    assert [group.source for group in scaling_groups(config)] == sources
    scaled = smooth().apply(model, [Batch(TOKENS, MASK)], RULES)
    expected = model(TOKENS)
    np.testing.assert_allclose(scaled(TOKENS), expected, atol=2e-5 * float(np.abs(expected).max()))
    norm = config.names.attention_norm
    before, after = (
        m.params["layers"][0][norm]["scale"] if norm in m.params["layers"][0] else None for m in (model, scaled)
    )
    assert before is None or not np.allclose(before, after, rtol=0.01)


def layer(seed=0):
    """A weight in two kernels, and inputs of which some are much stronger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 32)) * np.exp(rng.normal(size=32))
    kernels = [rng.normal(size=(32, width)).astype(np.float32) for width in (12, 20)]
    stats = InputStats(*(jnp.asarray(a, jnp.float32) for a in (np.abs(x).sum(0), np.abs(x).max(0), x.T @ x)))
    return x, kernels, stats


def rounded_by_numpy(weight, bits, rows):
    """To nearest, asymmetric, in float64."""
    found = []
    for group in np.split(weight.astype(np.float64), range(rows, len(weight), rows)):
        scale, zero = oracle.minmax_grid(group, bits, False)
        found.append((np.clip(np.round(group / scale) + zero, 0, 2**bits - 1) - zero) * scale)
    return np.concatenate(found)


def test_awq_finds_the_power_that_a_search_on_outputs_finds():
    x, kernels, stats = layer()
    spec = QuantSpec(bits=3, group_size=16, symmetric=False)
    losses, candidates = [], []
    for step in range(20):
        scales = np.abs(x).mean(0) ** (step / 20)
        scales /= np.sqrt(scales.max() * scales.min())
        rounded = [rounded_by_numpy(k * scales[:, None], 3, 16) for k in kernels]
        losses.append(sum(np.sum((x @ (k - r / scales[:, None])) ** 2) for k, r in zip(kernels, rounded, strict=True)))
        candidates.append(scales)
    found = search(tuple(map(jnp.asarray, kernels)), (spec, spec), stats, steps=20)
    np.testing.assert_allclose(found, candidates[int(np.argmin(losses))], rtol=1e-4)
    assert min(losses) < 0.8 * losses[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_scales_for_gptq_are_those_it_loses_least_with(bits):
    """Against GPTQ itself at each of them, in float64; and the choice is that of the formula."""
    x, kernels, stats = layer(2)
    spec = QuantSpec(bits=bits, group_size=16, symmetric=False)
    hessian, order = x.T @ x, np.argsort(-np.sum(x**2, axis=0))
    damped = hessian + 0.01 * np.trace(hessian) / 32 * np.eye(32)
    pivots = np.empty(32)
    pivots[order] = np.diag(np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T) ** -2.0
    grid = {"bits": bits, "symmetric": False}
    expected, lost, candidates = np.zeros(20), np.zeros(20), []
    for step in range(20):
        scales = np.abs(x).mean(0) ** (step / 20)
        scales /= np.sqrt(scales.max() * scales.min())
        candidates.append(scales)
        for kernel in kernels:
            scaled = kernel * scales[:, None]
            for rows in (slice(0, 16), slice(16, 32)):
                weights, importance = scaled[rows], (pivots / scales**2)[rows]
                size, zero, _ = oracle.search_grid(weights, importance, **grid, norm=2.0)
                rounded = (np.clip(np.round(weights / size) + zero, 0, 2**bits - 1) - zero) * size
                expected[step] += np.sum(importance[:, None] * (weights - rounded) ** 2)
            how = {"group_size": 16, "order": "activation", "static_groups": True, "grid": "ldl"}
            solved, _ = oracle.gptq(scaled, hessian / np.outer(scales, scales), **grid, **how)
            lost[step] += oracle.proxy_loss(kernel, solved / scales[:, None], hessian)
    found = search(tuple(map(jnp.asarray, kernels)), (spec, spec), stats, steps=20, grid="ldl")
    best = int(np.argmin(expected))
    np.testing.assert_allclose(found, candidates[best], rtol=1e-4)
    assert lost[best] < 1.02 * lost.min() < 0.7 * lost[0]
    assert expected[best] == pytest.approx(lost[best], rel=0.15)


def test_layers_that_stay_float_have_no_say():
    _, kernels, stats = layer()
    spec = QuantSpec(bits=3, group_size=16)
    alone = search((jnp.asarray(kernels[0]),), (spec,), stats, steps=20)
    beside = search(tuple(map(jnp.asarray, kernels)), (spec, None), stats, steps=20)
    np.testing.assert_array_equal(alone, beside)


def test_smooth_scales_are_the_papers():
    x, kernels, stats = layer()
    weights = np.abs(np.concatenate(kernels, axis=1)).max(1)
    expected = np.abs(x).max(0) ** 0.3 / weights**0.7
    found = migrate(tuple(map(jnp.asarray, kernels)), (None, None), stats, alpha=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    silent = stats._replace(peak=stats.peak.at[3].set(0.0))
    assert float(migrate(tuple(map(jnp.asarray, kernels)), (None, None), silent, alpha=0.3)[3]) == 1.0


def test_rounding_a_rewritten_model_loses_less_and_the_report_says_what_was_done():
    model, spec = float_model(layers=1), QuantSpec(bits=3, group_size=16, symmetric=False)
    _, plain = quantize(model, BATCHES, spec, rtn())
    scaled, report = quantize(model, BATCHES, spec, rtn()._replace(rewrite=awq()))
    assert scaled.params["layers"][0]["mlp"]["up_proj"]["kernel"].spec.bits == 3
    # Those of the first input, which nothing before it has changed.
    own, others = (sum(layer.loss for layer in found.layers[:3]) for found in (report, plain))
    assert own < others
    made = {"method": "rtn", "rewrite": "awq", "awq_steps": 20, "awq_grid": "minmax"}
    assert made.items() <= report.settings.items()


def test_bad_options_and_models_are_named():
    bad = (lambda: awq(0), "steps=0"), (lambda: awq(grid="best"), "grid='best'"), (lambda: smooth(2.0), r"alpha=2\.0")
    for make, message in bad:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="not a supplied decoder"):
        awq().apply(object(), (), RULES)
