"""Models with experts through the whole pipeline: quantized, reported, saved, exported, run."""

import json
from dataclasses import replace
from functools import lru_cache
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import PROJECTIONS, SPEC, batches, checkpoint, float_model
from rich.console import Console
from safetensors.numpy import load_file, save_file

from gptq_jax import terminal
from gptq_jax.calibration import Batch
from gptq_jax.generate import generate_tokens
from gptq_jax.hooks.nnx import FUSED
from gptq_jax.inspection import inspect_model, inspection_table
from gptq_jax.methods.rtn import rtn
from gptq_jax.models.base import capture_block, embed, run_block
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import quantize
from gptq_jax.report import Report, expert_lines
from gptq_jax.storage import save
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.export import export
from gptq_jax.storage.load import load
from gptq_jax.tensor import QuantizedTensor, validate

HELD_OUT = batches(1, seed=7, shape=(8, 32))[0]


@lru_cache
def quantized(name="qwen3moe", method=None, min_expert_tokens=60):
    return quantize(float_model(name), batches(), SPEC, method, min_expert_tokens=min_expert_tokens)


def packed(model):
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedTensor)]


def assert_same_packed(one, other):
    assert len(packed(one)) == len(packed(other)) == 14
    for mine, its in zip(packed(one), packed(other), strict=True):
        for name in ("codes", "scales", "zeros", "group_of_row"):
            a, b = getattr(mine, name), getattr(its, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(a.dtype))


def block_error(name, model):
    """The relative error of the first block on tokens that calibration did not have."""
    whole = float_model(name)
    x = embed(whole.config, whole.params, jnp.asarray(HELD_OUT))
    kind = whole.config.layer_kind(0)
    expected, found = (run_block(m.config, kind, m.params["layers"][0], x)[0] - x for m in (whole, model))
    # Where a router decides otherwise, the error says nothing of the weights: the median of tokens.
    return float(np.median(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))


def test_gptq_is_better_than_rounding_on_outputs():
    (model, report), (rounded, rounded_report) = quantized(), quantized(method=rtn())
    assert block_error("qwen3moe", model) < 0.9 * block_error("qwen3moe", rounded)
    ours, theirs = ({layer.path: layer for layer in each.layers} for each in (report, rounded_report))
    for path in PROJECTIONS:
        layer = ours[f"layers.0.{path}"]
        assert layer.loss < 0.8 * layer.rtn_loss
        if "down" not in path:  # fed the same in both
            assert theirs[layer.path].loss == pytest.approx(theirs[layer.path].rtn_loss, rel=1e-4)


def test_stacked_kernels_are_packed_and_the_router_is_not():
    model, report = quantized()
    experts = model.params["layers"][0]["mlp"]["experts"]
    assert experts["up_proj"]["kernel"].shape == (8, 32, 16)
    assert experts["down_proj"]["kernel"].shape == (8, 16, 32)
    validate(experts["up_proj"]["kernel"])
    assert isinstance(model.params["layers"][0]["mlp"]["gate"]["kernel"], jax.Array)
    assert "decides which experts" in report.kept_float["layers.1.mlp.gate"]
    assert report.bits_per_weight == pytest.approx(5.0)
    assert len(report.layers) == 14


def test_losses_are_sums_over_experts_of_their_own_tokens():
    """Against numpy: the first layer's gates, on the inputs that the packed attention before them gives."""
    model, report = quantized(method=rtn())
    whole = float_model("qwen3moe")
    params = whole.params["layers"][0]
    attention = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf,
        model.params["layers"][0]["self_attn"],
        is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor),
    )
    loss = tokens = 0
    error = np.asarray(params["mlp"]["experts"]["gate_proj"]["kernel"]) - np.asarray(
        model.params["layers"][0]["mlp"]["experts"]["gate_proj"]["kernel"].dequantize()
    )
    for batch in batches():
        x = embed(whole.config, whole.params, jnp.asarray(batch))
        path = PROJECTIONS[0]
        routed = capture_block(whole.config, "decoder", {**params, "self_attn": attention}, x, (path,))[path]
        ends = np.cumsum(routed.sizes)
        for expert, (end, size) in enumerate(zip(ends, routed.sizes, strict=True)):
            loss += np.square(np.asarray(routed.rows)[end - size : end].astype(np.float64) @ error[expert]).sum()
        tokens += batch.size
    layer = next(layer for layer in report.layers if layer.path == f"layers.0.{PROJECTIONS[0]}")
    assert layer.loss == pytest.approx(loss / tokens, rel=1e-3)
    assert layer.tokens == tokens == 256


def test_experts_that_saw_too_few_tokens_are_named(monkeypatch):
    _, report = quantized()
    layer = next(layer for layer in report.layers if layer.path == "layers.1.mlp.experts.gate_proj")
    experts = layer.experts
    assert experts.count == 8
    assert experts.needed == 60
    assert experts.least < 60 <= experts.most
    assert len(experts.shared) >= 1
    assert experts.unseen == ()
    assert experts.rounded == ()
    assert layer.weights == 8 * 32 * 16
    data = json.loads(json.dumps(report.to_json()))
    assert data == report.to_json()
    assert Report.from_json(data) == report
    lines = expert_lines(data["layers"])
    (line,) = [line for line in lines if line.startswith("layers.1.mlp.experts.gate_proj, up_proj, down_proj: ")]
    numbers = ", ".join(map(str, experts.shared))
    assert f"{len(experts.shared)} of 8 experts saw fewer than 60 tokens" in line
    assert line.endswith(f": {numbers}")
    file = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=80))
    terminal.summarize(report)
    assert line in file.getvalue()
    assert report.settings["min_expert_tokens"] == 60


def with_unused_experts():
    """Routers choose 3 of 8: of each of three pairs the one with a positive logit, and never the last two."""
    whole = float_model("qwen3moe")
    layers = []
    for layer in whole.params["layers"]:
        three = layer["mlp"]["gate"]["kernel"][:, :3]
        columns = jnp.stack([three, -three], axis=-1).reshape(32, 6)
        router = {"kernel": jnp.pad(columns, ((0, 0), (0, 2)))}
        layers.append({**layer, "mlp": {**layer["mlp"], "gate": router}})
    return replace(whole, params={**whole.params, "layers": layers})


def test_experts_without_tokens_are_solved_with_those_of_all_and_named():
    model, report = quantize(with_unused_experts(), batches(), SPEC, min_expert_tokens=0)
    for layer in report.layers:
        if layer.experts is not None:
            assert layer.experts.unseen == layer.experts.shared == (6, 7)
            assert layer.experts.least == 0
            assert layer.experts.needed == 1
    assert len(lines := expert_lines(report.to_json()["layers"])) == 2
    assert "no token at all: 6, 7" in lines[0]
    weights = with_unused_experts().params["layers"][0]["mlp"]["experts"]["up_proj"]["kernel"]
    found = model.params["layers"][0]["mlp"]["experts"]["up_proj"]["kernel"].dequantize()
    # No worse a grid than that of experts with tokens, and not what rounding to nearest would give.
    error = np.abs(np.asarray(found - weights)).mean(axis=(1, 2))
    assert error[6:].max() < 1.5 * error[:6].max()
    assert np.isfinite(np.asarray(model(HELD_OUT))).all()


def test_padding_is_no_token_of_an_expert():
    short = batches(1, shape=(4, 20))[0]
    padded = np.concatenate([short, np.full((4, 12), 5, np.int32)], axis=1)
    mask = np.arange(32)[None] < np.full((4, 1), 20)
    results = [quantize(float_model("qwen3moe"), [batch], SPEC, rtn())[1] for batch in (short, Batch(padded, mask))]
    for one, other in zip(*(report.layers for report in results), strict=True):
        assert one.experts == other.experts
        assert one.tokens == other.tokens == 80
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_what_is_recorded_once_serves_every_stage(monkeypatch):
    """Inputs that are computed again, rather than kept, give the same codes."""
    monkeypatch.setattr("gptq_jax.pipeline.KEPT_BYTES", 0)
    again, _ = quantize(float_model("qwen3moe"), batches(), SPEC, min_expert_tokens=60)
    same = [
        np.mean(np.asarray(a.codes) == np.asarray(b.codes))
        for a, b in zip(packed(again), packed(quantized()[0]), strict=True)
    ]
    assert min(same) > 0.98


@pytest.mark.parametrize("wrong", [-1])
def test_a_negative_threshold_is_refused_before_any_work(wrong):
    with pytest.raises(ValueError, match="min_expert_tokens=-1 must not be negative"):
        quantize(float_model("qwen3moe"), [], SPEC, min_expert_tokens=wrong)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "store"
    save(quantized()[0], path)
    return path


def test_saved_and_loaded_bit_identical(store):
    again = load(store)
    assert_same_packed(again, quantized()[0])
    np.testing.assert_array_equal(again(HELD_OUT), quantized()[0](HELD_OUT))


def test_inspect_names_the_experts(store):
    result = inspect_model(str(store))
    layer = next(layer for layer in result["layers"] if layer["path"] == "layers.1.mlp.experts.gate_proj")
    assert layer["shape"] == [8, 32, 16]
    assert layer["experts"]["count"] == 8
    assert layer["implementations"]["xla_tiled"] == "runs"
    assert result["bits_per_weight"] == pytest.approx(5.0)
    lines = [part for part in inspection_table(result) if isinstance(part, str)]
    assert any("8 experts saw fewer than 60 tokens" in line for line in lines)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_prepared_gates_and_ups_are_one_product(implementation):
    model = quantized()[0]
    ready = prepare(model, implementation)
    fused = ready.params["layers"][0][FUSED]
    assert [each.paths for each in fused][-1] == PROJECTIONS[:2]
    assert fused[-1].weight.problem.experts == 8
    expected = model(HELD_OUT)
    np.testing.assert_allclose(ready(HELD_OUT), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    tokens = [list(generate_tokens(each, HELD_OUT[0], max_new_tokens=6, stop_tokens=())) for each in (model, ready)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_exported_and_loaded_bit_identical(name, format, tmp_path):
    model, _ = quantized(name, rtn() if name == "mixtral" else None)
    export(model, tmp_path / "out", format=format, dtype="float32")
    again = load(tmp_path / "out")
    assert_same_packed(again, model)
    np.testing.assert_array_equal(again(HELD_OUT), model(HELD_OUT))


def test_exported_floats_are_the_dequantized_weights(tmp_path):
    model, _ = quantized("mixtral", rtn())
    export(model, tmp_path / "out", format="float", dtype="float32")
    expected = model(HELD_OUT)
    np.testing.assert_allclose(load(tmp_path / "out")(HELD_OUT), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_float_model_is_exported_as_transformers_saved_it(tmp_path):
    (tmp_path / "saved").mkdir()
    checkpoint(tmp_path / "saved", "mixtral")
    export(float_model("mixtral"), tmp_path / "out", format="float", dtype="float32")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_gguf_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="models with experts cannot be written as GGUF: use --format gptq"):
        export(quantized()[0], tmp_path / "out.gguf", format="gguf")


def damaged(folder, change):
    """A GPTQ checkpoint of the model, its tensors changed."""
    export(quantized("mixtral", rtn())[0], folder / "out", format="gptq", dtype="float32")
    file = folder / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "out"


MODULE = "model.layers.1.block_sparse_moe.experts.2.w3"


def lacking(tensors):
    del tensors[f"{MODULE}.scales"]


def one_float(tensors):
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{MODULE}.{suffix}"]
    tensors[f"{MODULE}.weight"] = np.zeros((48, 32), np.float32)


def other_dtype(tensors):
    tensors[f"{MODULE}.scales"] = tensors[f"{MODULE}.scales"].astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, r"experts\.2\.w3\.scales is missing"),
        (one_float, r"experts\.2\.w3 is float, but other experts of its layer are packed"),
        (
            other_dtype,
            r"experts\.\{expert\}\.w3: experts have different grids, 4 bits .* \(float16\) and .* \(float32\)",
        ),
    ],
)
def test_packed_experts_that_do_not_fit_are_named(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(tmp_path, change))


def test_an_expert_in_another_order_is_stacked_with_the_rest(tmp_path):
    order = np.repeat([1, 0], 16).astype(np.int32)  # groups of 16 inputs, exchanged

    def change(tensors):
        tensors[f"{MODULE}.g_idx"] = order

    found = load(damaged(tmp_path, change)).params["layers"][1]["block_sparse_moe"]["experts"]["w3"]["kernel"]
    np.testing.assert_array_equal(found.group_of_row[2], order)
    np.testing.assert_array_equal(found.group_of_row[0], order[::-1])
    expected = quantized("mixtral", rtn())[0].params["layers"][1]["block_sparse_moe"]["experts"]["w3"]["kernel"]
    np.testing.assert_array_equal(found.dequantize()[0], expected.dequantize()[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_local_experts": 5}, r"experts\.4\.w1\.weight is missing"),
        ({"num_local_experts": 2}, r"experts\.2\.w1\.weight belongs to no part"),
        ({"num_local_experts": 10**6}, "it has 1000000 experts, but there are"),
        ({"intermediate_size": 40}, r"experts\.0\.w1\.weight has shape \(48, 32\), not \(40, 32\)"),
    ],
)
def test_configs_of_other_experts_do_not_fit(fields, message, tmp_path):
    file = checkpoint(tmp_path, "mixtral") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
