"""Sensitivity: against the divergence that random changes of weights bring, and what padding and windows count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_quantization import BATCHES, float_model

from gptq_jax import sensitivity
from gptq_jax.activations import Activations
from gptq_jax.hooks.nnx import kernel_of, with_kernel
from gptq_jax.sensitivity import expected_divergence, fisher_traces

LAYERS = ["layers.0.self_attn.k_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.up_proj"]


@pytest.fixture(scope="module")
def model():
    return float_model()


def traces_of(model, tokens, masks=None, **options):
    return fisher_traces(model.calibration(tokens, masks or [None] * len(tokens)), LAYERS, **options)


def changed(model, path, change):
    index, inner = path.removeprefix("layers.").split(".", 1)
    blocks = list(model.params["layers"])
    blocks[int(index)] = with_kernel(blocks[int(index)], inner, kernel_of(blocks[int(index)], inner) + change)
    return replace(model, params={**model.params, "layers": blocks})


def divergence(model, other, tokens):
    """KL in nats per token, in float64 from the logits."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(each(tokens)), np.float64) for each in (model, other))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


@pytest.fixture(scope="module")
def often(model):
    """Eight rows, and their traces from 64 random slopes in each."""
    tokens = np.random.default_rng(5).integers(0, 96, (8, 24), dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "WINDOWS", 512)
        return tokens, traces_of(model, [np.tile(tokens, (64, 1))])


@pytest.mark.parametrize("path", LAYERS)
def test_a_random_change_brings_half_the_trace_times_its_variance(model, often, path):
    """The mean over D with independent entries is exact to second order, whatever slopes look like.

    Both are means of draws, within some 10 % of what they estimate.
    """
    tokens, traces = often
    shape, size = kernel_of(model.params["layers"][0], path.split(".", 2)[2]).shape, 3e-3
    found = [
        divergence(model, changed(model, path, jnp.asarray(size * rng.standard_normal(shape), jnp.float32)), tokens)
        for rng in map(np.random.default_rng, range(32))
    ]
    assert np.mean(found) == pytest.approx(0.5 * traces[path] * size**2, rel=0.3)


def test_expected_divergence_of_a_random_change_is_that():
    """With D of independent entries, the mean of tr(D^T H D) is variance * tr(H) * d_out."""
    assert expected_divergence(7.0, 0.01 * 5.0 * 3, 5.0, 3) == pytest.approx(0.5 * 7.0 * 0.01)


def test_padding_counts_for_nothing(model):
    """One row of 16 tokens, behind it what is not real, and a row of nothing."""
    tokens = np.array(BATCHES[0][:2])
    mask = np.zeros(tokens.shape, bool)
    mask[0, :16] = True
    padded, other = (traces_of(model, [each], [mask]) for each in (tokens, np.where(mask, tokens, 1)))
    assert padded == pytest.approx(other, rel=1e-5)
    windows = sensitivity._windows(model.calibration([tokens], [mask]))
    assert [window.tokens for window in windows] == [16]


def test_windows_are_the_first_rows_of_all_batches(model, monkeypatch):
    monkeypatch.setattr(sensitivity, "WINDOWS", 4)
    joined = [np.concatenate(BATCHES)]
    assert traces_of(model, BATCHES) == pytest.approx(traces_of(model, joined), rel=1e-6)
    assert traces_of(model, BATCHES) == pytest.approx(traces_of(model, [joined[0][:4]]), rel=1e-6)


def test_the_stream_may_wait_in_a_file(model, tmp_path, monkeypatch):
    used = []

    class Watched(Activations):
        def __init__(self, directory):
            used.append(directory)
            super().__init__(directory)

    monkeypatch.setattr(sensitivity, "Activations", Watched)
    assert traces_of(model, BATCHES, directory=tmp_path) == traces_of(model, BATCHES)
    assert used == [tmp_path, None]


def test_slopes_that_are_not_finite_are_said(model):
    broken = changed(model, LAYERS[-1], jnp.inf)
    with pytest.raises(ValueError, match=r"no finite slope in layers\.\d\.\w+\.\w+: check it, or use float32"):
        traces_of(broken, BATCHES)


def test_a_model_without_a_known_head_is_refused(model):
    calibration = replace(model.calibration(BATCHES, [None, None]), head=None)
    with pytest.raises(ValueError, match="head is not known"):
        fisher_traces(calibration, LAYERS)
