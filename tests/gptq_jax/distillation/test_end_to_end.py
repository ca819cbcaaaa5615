"""Slopes of the whole model against differences of a float64 numpy one; what is kept, thrown away and refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import llama_numpy
import numpy as np
import optax
import pytest
from expert_models import SPEC as EXPERT_SPEC
from expert_models import batches as expert_batches
from expert_models import float_model as expert_model
from tiny_quantization import CONFIG, float_model, rounded

from gptq_jax.calibration import Batch
from gptq_jax.distillation import distill, end_to_end_tuning
from gptq_jax.distillation.end_to_end import check_models, cut
from gptq_jax.hooks.nnx import kernel_of, with_kernel
from gptq_jax.methods import gptq, rtn
from gptq_jax.models.base import linear_paths
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import MemorySink, quantize, quantize_blocks
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.progress import Progress
from gptq_jax.tensor import QuantizedTensor
from gptq_jax.tuning import block_tuning

SPEC = QuantSpec(bits=2, group_size=24, symmetric=False, scale_dtype="float32")
WINDOWS = np.random.default_rng(0).integers(0, 96, (6, 16), dtype=np.int32)
MODEL = float_model()
PACKED = rounded(MODEL, SPEC)


def weights_by_hand(model):
    """Of each block, in float64: kernels by path, packed ones as codes less zero points, scales and groups."""
    found = []
    for block in model.params["layers"]:
        weights = {norm: np.asarray(block[norm]["scale"], np.float64) for norm in block if norm.endswith("layernorm")}
        for path in linear_paths(model.config, model.config.layer_kind(0)):
            kernel = kernel_of(block, path)
            if isinstance(kernel, QuantizedTensor):
                kernel = kernel.dequantize()
            weights[path] = np.asarray(kernel, np.float64)
        found.append(weights)
    return found


def log_probabilities(model, blocks, tokens, real):
    embedding = np.asarray(model.params["embed"]["embedding"], np.float64)
    x = embedding[tokens]
    for weights in blocks:
        _, x = llama_numpy.block(weights, x, CONFIG, real)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"])
    logits = x * np.asarray(model.params["head"]["norm"]["scale"], np.float64) @ embedding.T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence_by_hand(blocks, tokens, real):
    wanted = log_probabilities(MODEL, weights_by_hand(MODEL), tokens, real)
    found = log_probabilities(PACKED, blocks, tokens, real)
    return np.sum((np.exp(wanted) * (wanted - found)).sum(-1) * real) / real.sum()


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_is_the_slope_of_the_whole_model(padded):
    """One step of plain gradient descent, against central differences of the numpy model."""
    mask = np.ones(WINDOWS.shape, bool)
    if padded:
        mask[0, :5] = False  # on the left, where later tokens would see it
        mask[1, 11:] = False
    rate = 1e-2
    tuning = block_tuning(epochs=1)._replace(optimizer=lambda steps: optax.sgd(rate))
    batch = Batch(WINDOWS[:2], mask[:2]) if padded else WINDOWS[:2]
    trained, found = distill(MODEL, PACKED, [batch], tuning=tuning)
    assert found.steps == 1
    blocks = weights_by_hand(PACKED)
    assert found.before == pytest.approx(divergence_by_hand(blocks, WINDOWS[1:2], mask[1:2]), rel=1e-4)
    assert found.after == pytest.approx(divergence_by_hand(weights_by_hand(trained), WINDOWS[1:2], mask[1:2]), rel=1e-4)
    assert found.after < found.before
    groups = {path: np.arange(len(blocks[0][path])) // 24 for path in ("self_attn.k_proj", "mlp.down_proj")}
    for index, path, group, output in [
        (0, "self_attn.k_proj", 1, 3),
        (0, "mlp.down_proj", 3, 7),
        (1, "mlp.down_proj", 0, 0),
    ]:
        slopes = []
        for change in (1e-4, -1e-4):
            moved = [dict(weights) for weights in blocks]
            moved[index][path] = moved[index][path].copy()
            moved[index][path][groups[path] == group, output] *= np.exp(change)
            slopes.append(divergence_by_hand(moved, WINDOWS[:1], mask[:1]))
        slope = (slopes[0] - slopes[1]) / 2e-4
        old, new = (kernel_of(model.params["layers"][index], path) for model in (PACKED, trained))
        change = np.log(float(new.scales[group, output]) / float(old.scales[group, output]))
        assert change == pytest.approx(-rate * slope, rel=2e-3, abs=2e-7)  # a float32 scale is no finer
        np.testing.assert_array_equal(new.codes, old.codes)


def test_predictions_come_nearer_on_text_that_was_not_seen():
    """Windows of one text that repeats itself, so that those held back are like the others."""
    text = np.tile(np.random.default_rng(1).integers(0, 96, 20, dtype=np.int32), 6)
    rows = np.stack([text[at : at + 16] for at in range(80)])
    trained, found = distill(MODEL, PACKED, [rows[::2], rows[1::2]], tuning=block_tuning(epochs=2, rate=1e-2))
    assert found.after < 0.5 * found.before
    assert found.steps == 2 * 75  # five of eighty are held back
    assert jax.tree.structure(trained.params) == jax.tree.structure(PACKED.params)
    assert prepare(trained)(rows[:1]).shape == (1, 16, 96)


def test_what_does_not_help_is_thrown_away():
    trained, found = distill(MODEL, PACKED, [WINDOWS], tuning=block_tuning(epochs=1, rate=1.0))
    assert found.after == found.before
    assert trained is PACKED


def test_layers_that_stay_float_do():
    some = rounded(MODEL, SPEC, r"mlp\.up")
    trained, _ = distill(MODEL, some, [np.repeat(WINDOWS[:1], 4, axis=0)])
    for ours, theirs in zip(trained.params["layers"], MODEL.params["layers"], strict=True):
        np.testing.assert_array_equal(ours["mlp"]["down_proj"]["kernel"], theirs["mlp"]["down_proj"]["kernel"])
        assert isinstance(ours["mlp"]["up_proj"]["kernel"], QuantizedTensor)


@pytest.fixture
def written_at_once(monkeypatch):
    monkeypatch.setattr("gptq_jax.storage.progress.EVERY", 0.0)


def test_stacked_experts_move_too():
    """The router stays float; the same window to learn from and to be judged by."""
    model = expert_model("qwen3moe_mixed")
    packed = rounded(model, EXPERT_SPEC)
    row = np.asarray(expert_batches()[0])[:1, :12]
    trained, found = distill(model, packed, [np.repeat(row, 5, axis=0)], tuning=block_tuning(epochs=2, rate=1e-2))
    assert found.after < 0.9 * found.before
    for before, after in zip(packed.params["layers"], trained.params["layers"], strict=True):
        for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
            assert path[-1] == jax.tree_util.GetAttrKey("scales") or np.array_equal(one, other)


def test_a_run_goes_on_with_the_bits_of_one_in_peace(tmp_path, written_at_once):
    tuning = block_tuning(epochs=2, rate=1e-2)
    batches = [np.repeat(WINDOWS[:2], 2, axis=0)]
    peaceful, found = distill(MODEL, PACKED, batches, tuning=tuning)
    told = {"model": "tiny"}

    def stop(done, steps):
        if done == 4:
            raise KeyboardInterrupt

    first = Progress(tmp_path / "kept", told)
    with pytest.raises(KeyboardInterrupt):
        distill(MODEL, PACKED, batches, tuning=tuning, progress=first, on_step=stop)
    assert first.kept() == "4 steps are kept; the same command goes on"
    steps = []
    again = Progress(tmp_path / "kept", told)
    assert again.done == 4
    resumed, found_again = distill(
        MODEL, PACKED, batches, tuning=tuning, progress=again, on_step=lambda *at: steps.append(at)
    )
    assert steps == [(5, 6), (6, 6)]
    assert found_again == found
    for one, other in zip(jax.tree.leaves(peaceful.params), jax.tree.leaves(resumed.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    again.discard()
    assert not (tmp_path / "kept").exists()


def test_progress_of_another_run_is_refused(tmp_path, written_at_once):
    Progress(tmp_path / "kept", {"settings": {"rate": 0.1}}).keep([jnp.zeros(3)], 1)
    with pytest.raises(ValueError, match=r"another run: settings\.rate was 0\.1, is 0\.2\. Pass --restart"):
        Progress(tmp_path / "kept", {"settings": {"rate": 0.2}})
    other = Progress(tmp_path / "kept", {"settings": {"rate": 0.1}})
    with pytest.raises(ValueError, match="holds other arrays"):
        other.open([jnp.zeros(4)])
    assert Progress(tmp_path / "kept", {"settings": {"rate": 0.2}}, restart=True).done == 0
    (tmp_path / "kept").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        Progress(tmp_path / "kept", {})


def test_one_window_of_sixteen_is_held_back():
    rows = np.arange(40, dtype=np.int32)[:, None].repeat(2, axis=1)
    learned, held_back = cut([rows[:20], rows[20:]], MODEL)
    assert [int(window.tokens[0, 0]) for window in held_back] == [15, 31]
    assert len(learned) == 38
    mask = np.ones((3, 2), bool)
    mask[1] = False
    learned, held_back = cut([Batch(rows[:3], mask)], MODEL)
    assert [int(window.tokens[0, 0]) for window in (*learned, *held_back)] == [0, 2]


@pytest.mark.parametrize(
    ("quantized", "batches", "message"),
    [
        (MODEL, WINDOWS, "holds no packed layers"),
        (PACKED, WINDOWS[:1], "1 windows: pass at least two"),
        (PACKED, WINDOWS + 90, "the vocabulary is 0..95"),
        (replace(PACKED, config=replace(PACKED.config, vocab_size=95)), WINDOWS, r"vocabularies hold \[95, 96\]"),
    ],
)
def test_bad_input_is_refused_by_name(quantized, batches, message):
    with pytest.raises(ValueError, match=message):
        distill(MODEL, quantized, [batches])


def test_other_kinds_of_models_are_refused():
    with pytest.raises(ValueError, match="is prepared to run here"):
        distill(MODEL, prepare(PACKED), [WINDOWS])
    with pytest.raises(ValueError, match="supplied architectures"):
        check_models(MODEL, object())


def test_weights_that_are_not_finite_stop_the_work():
    broken = with_kernel(
        PACKED.params["layers"][0],
        "mlp.up_proj",
        replace(kernel_of(PACKED.params["layers"][0], "mlp.up_proj"), scales=jnp.full((2, 80), jnp.nan)),
    )
    model = replace(PACKED, params={**PACKED.params, "layers": [broken, PACKED.params["layers"][1]]})
    with pytest.raises(ValueError, match="the divergence is nan in step 1 of 5: use a lower rate"):
        distill(MODEL, model, [WINDOWS])


def test_the_end_of_a_method():
    rows = np.repeat(np.arange(64, dtype=np.int32)[:, None], 8, axis=1)
    method = rtn()._replace(finish=end_to_end_tuning(epochs=1, rate=1e-2))
    assert method.all_settings["finish"] == "distill"
    found, report = quantize(MODEL, [rows], SPEC, method)
    alone, _ = distill(MODEL, rounded(MODEL, SPEC), [rows], tuning=block_tuning(epochs=1, rate=1e-2))
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_array_equal(one, other)
    told = report.settings["distilled"]
    assert told["after"] < told["before"]
    assert found.report["settings"]["distilled"] == told
    with pytest.raises(ValueError, match="finish 'distill', which needs the whole model in memory"):
        quantize_blocks(
            MODEL, MemorySink(lambda blocks, report: None), [rows], SPEC, gptq()._replace(finish=end_to_end_tuning())
        )
