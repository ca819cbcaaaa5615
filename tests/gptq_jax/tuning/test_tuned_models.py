"""Tuning inside the pipeline: on blocks of attention, experts and modules of one's own."""

from dataclasses import replace

import expert_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_modules
import pytest
from decoder_models import byte_tokenizer
from tiny_quantization import BATCHES, compilations, float_model

from gptq_jax import (
    QuantSpec,
    StoreSink,
    Tuning,
    adapt,
    block_tuning,
    gptq,
    learned_rounding,
    load,
    qep,
    quantize,
    quantize_blocks,
    save,
)
from gptq_jax.calibration import Batch
from gptq_jax.report import Report
from gptq_jax.tensor import QuantizedTensor

SPEC = QuantSpec(bits=2, group_size=24, symmetric=False)
TUNINGS = {"tune": block_tuning(epochs=1, rate=0.02), "autoround": learned_rounding(epochs=5)}


def tensors(model):
    return jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def same(first, second):
    leaves = zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def changes(report):
    """What tuning did to each block."""
    return list(dict.fromkeys(layer.tuning for layer in report.layers))


@pytest.fixture(scope="module")
def tuned():
    return quantize(float_model(), BATCHES, SPEC, qep()._replace(tuning=TUNINGS["tune"]))


def test_the_error_of_every_block_falls(tuned):
    model, report = tuned
    found = changes(report)
    assert len(found) == 2
    assert all(0 < change.after < 0.95 * change.before for change in found)
    assert report.tuned.after == pytest.approx(np.mean([change.after for change in found]))
    assert Report.from_json(report.to_json()) == report
    assert report.settings["tuning"] == "block tuning"
    assert report.settings["tuning_rate"] == 0.02
    assert report.seconds["tune"] > 0
    assert all(np.isfinite(model(BATCHES[0])).ravel())


def test_the_first_block_is_solved_as_without_tuning_and_differs_in_scales_only(tuned):
    plain, report = quantize(float_model(), BATCHES, SPEC, qep())
    first, other = (model.params["layers"][0]["mlp"]["down_proj"]["kernel"] for model in (tuned[0], plain))
    np.testing.assert_array_equal(first.codes, other.codes)
    np.testing.assert_array_equal(first.zeros, other.zeros)
    assert np.any(np.asarray(first.scales) != np.asarray(other.scales))
    assert first.scales.dtype == other.scales.dtype
    losses = [[layer.loss for layer in each.layers[:7]] for each in (tuned[1], report)]
    assert losses[0] == losses[1]
    assert report.tuned is None


def test_a_second_run_compiles_nothing_and_gives_the_same(tuned):
    """The same programs serve every block, and another model of the same shapes."""
    quantize(float_model(layers=3, seed=1), BATCHES, SPEC, qep()._replace(tuning=TUNINGS["tune"]))
    with compilations() as found:
        again, _ = quantize(float_model(), BATCHES, SPEC, qep()._replace(tuning=TUNINGS["tune"]))
    assert found == []
    assert same(tuned[0], again)


@pytest.mark.slow
def test_experts(tmp_path):
    method = gptq()._replace(tuning=TUNINGS["autoround"])
    packed, report = quantize(expert_models.float_model("mixtral"), expert_models.batches(), expert_models.SPEC, method)
    assert all(change.after < change.before for change in changes(report))
    save(packed, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), packed)


def test_padding_does_not_matter():
    masks = [np.arange(24)[None] >= np.array([[0], [7], [24]]) for _ in BATCHES]  # the last row is all padding
    found = []
    for filler in (0, 5):
        batches = [Batch(np.where(mask, rows, filler), mask) for rows, mask in zip(BATCHES, masks, strict=True)]
        found.append(quantize(float_model(layers=1), batches, SPEC, gptq()._replace(tuning=TUNINGS["tune"]))[0])
    assert same(*found)


def test_what_makes_it_worse_is_thrown_away():
    tuning = block_tuning(epochs=1, rate=5.0)
    wild, report = quantize(float_model(), BATCHES, SPEC, gptq()._replace(tuning=tuning))
    plain, _ = quantize(float_model(), BATCHES, SPEC, gptq())
    assert all(change.after == change.before for change in changes(report))
    for first, second in zip(tensors(wild), tensors(plain), strict=True):
        if isinstance(first, QuantizedTensor):
            np.testing.assert_allclose(first.dequantize(), second.dequantize(), atol=1e-6)


@pytest.mark.parametrize("name", ["qep", "gptq"])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, name):
    model = replace(float_model(layers=3), tokenizer=byte_tokenizer())
    method = {"qep": qep(), "gptq": gptq()}[name]._replace(tuning=TUNINGS["tune"])

    def run(path, stop_after=None, method=method, **options):
        sink = StoreSink(path, model)
        write = sink.write

        def stops(index, *rest):
            if index == stop_after:
                raise KeyboardInterrupt
            write(index, *rest)

        sink.write = stops
        with sink:
            quantize_blocks(model, sink, BATCHES, SPEC, method, devices=1, **options)
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    whole = run(tmp_path / "whole", activations=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=2)
    other = method._replace(tuning=block_tuning(epochs=1, rate=0.01))
    with pytest.raises(ValueError, match=r"tuning_rate was 0\.02, and is 0\.01 now"):
        run(tmp_path / "out", method=other)
    assert run(tmp_path / "out") == whole
    report = load(tmp_path / "out").report
    assert len({layer["tuning"]["after"] for layer in report["layers"]}) == 3


@pytest.mark.slow
def test_modules_of_ones_own():
    """The state between two blocks is a dict of values, and cannot be cut into windows."""
    module = own_modules.LinenLM(scan=True)
    tokens = np.random.default_rng(0).integers(0, own_modules.VOCAB, (2, 12), dtype=np.int32)
    model = adapt(module, module.init(jax.random.key(0), tokens), blocks="layers")
    packed, report = quantize(model, [tokens], SPEC, gptq()._replace(tuning=TUNINGS["tune"]))
    assert len(changes(report)) == 2
    assert all(change.after < change.before for change in changes(report))
    assert np.all(np.isfinite(packed(tokens)))


def tuning_with(**changed):
    return TUNINGS["tune"]._replace(name="mine", **changed)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (tuning_with(start=lambda weight, tensor: 3), "'mine': start returned variables of int"),
        (tuning_with(start=lambda weight, tensor: jnp.arange(3)), "start returned variables of int32"),
        (
            tuning_with(values=lambda moved, weight, tensor: (weight[1:], block_values(moved, weight, tensor)[1])),
            r"values returned codes, scales and zeros of \(\(7, 4\)",
        ),
        (
            tuning_with(values=lambda moved, weight, tensor: (0 * weight, block_values(moved, weight, tensor)[1])),
            "another weight, but must be the one packed",
        ),
        (tuning_with(optimizer=lambda steps: 0.1), "optimizer returned float, not an optax.GradientTransformation"),
    ],
)
def test_a_broken_tuning_is_refused_before_the_work(tuning, message):
    with pytest.raises(ValueError, match=message):
        quantize(float_model(), BATCHES, SPEC, gptq()._replace(tuning=tuning))


def block_values(*args):
    return TUNINGS["tune"].values(*args)


def test_a_tuning_of_ones_own():
    """Only the scales of the second half of the outputs, by plain descent."""

    def start(weight, tensor):
        return jnp.zeros((tensor.scales.shape[0], tensor.d_out // 2))

    def values(moved, weight, tensor):
        all_of_them = jnp.concatenate([jnp.zeros_like(moved), moved], axis=1)
        return TUNINGS["tune"].values({"log_scale": all_of_them}, weight, tensor)

    mine = Tuning(start, values, lambda steps: optax.sgd(0.1), epochs=1, name="half")
    packed, report = quantize(float_model(), BATCHES, SPEC, gptq()._replace(tuning=mine))
    plain, _ = quantize(float_model(), BATCHES, SPEC, gptq())
    assert changes(report)[0].after < changes(report)[0].before
    moved, before = (model.params["layers"][0]["mlp"]["up_proj"]["kernel"].scales for model in (packed, plain))
    half = before.shape[1] // 2
    np.testing.assert_array_equal(moved[:, :half], before[:, :half])
    assert np.any(np.asarray(moved[:, half:]) != np.asarray(before[:, half:]))
