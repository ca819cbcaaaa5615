import importlib
from dataclasses import replace
from io import StringIO

import jax
import jax.numpy as jnp
import llama_numpy
import numpy as np
import pytest
from decoder_models import build
from rich.console import Console
from tiny_quantization import BATCHES, CONFIG, compilations, float_model

from gptq_jax import terminal
from gptq_jax.calibration import Batch
from gptq_jax.inspection import inspect_model, inspection_table
from gptq_jax.methods import gptq, gptq_solve, rtn
from gptq_jax.models.base import BlockForward
from gptq_jax.pipeline import is_quantized, quantize
from gptq_jax.report import without_times
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage import load, save
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import unpack

block_module = importlib.import_module("gptq_jax.block")
SPEC = QuantSpec(bits=3, group_size=24, scale_dtype="float16")
METHOD = gptq(grid="minmax")  # one method and few shapes: compiling is most of what these tests take
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PATHS = tuple(path for stage in STAGES for path in stage)


@pytest.fixture(scope="module")
def model():
    return float_model()


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model, BATCHES, SPEC, METHOD)


def kernel(params, path):
    for name in path.split("."):
        params = params[name]
    return params["kernel"]


def codes(tensor):
    return np.asarray(unpack(tensor.codes, tensor.spec.bits, tensor.d_in))


def equal_codes(one, other):
    """The fraction of codes that two models share, by layer."""
    return {
        f"{index}.{path}": np.mean(codes(kernel(a, path)) == codes(kernel(b, path)))
        for index, (a, b) in enumerate(zip(one.params["layers"], other.params["layers"], strict=True))
        for path in PATHS
        if isinstance(kernel(a, path), QuantizedTensor)
    }


def numpy_weights(float_block, packed_block, quantized_paths):
    """A block's weights, those of `quantized_paths` as dequantized from the packed block."""
    weights = {
        path: np.asarray(
            kernel(packed_block, path).dequantize() if path in quantized_paths else kernel(float_block, path)
        )
        for path in PATHS
    }
    norms = {name: np.asarray(float_block[name]["scale"]) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: value.astype(np.float64) for name, value in {**weights, **norms}.items()}


def oracle_hessians(model, packed, index, already):
    """X^T X of each layer of block `index`, all blocks before it quantized, and inside it those in `already`."""
    hessians = dict.fromkeys(PATHS, 0.0)
    for batch in BATCHES:
        x = np.asarray(model.params["embed"]["embedding"], np.float64)[batch]
        for before in range(index):
            weights = numpy_weights(model.params["layers"][before], packed.params["layers"][before], PATHS)
            _, x = llama_numpy.block(weights, x, CONFIG)
        weights = numpy_weights(model.params["layers"][index], packed.params["layers"][index], already)
        inputs, _ = llama_numpy.block(weights, x, CONFIG)
        for path, value in inputs.items():
            rows = value.reshape(-1, value.shape[-1])
            hessians[path] = hessians[path] + rows.T @ rows
    return hessians


@pytest.mark.parametrize("true_sequential", [True, False])
def test_each_layer_is_solved_for_what_its_quantized_predecessors_feed_it(model, quantized, true_sequential):
    packed, report = quantized if true_sequential else quantize(model, BATCHES, SPEC, METHOD, true_sequential=False)
    reports = {layer.path: layer for layer in report.layers}
    unlike = []  # how many codes another notion of what feeds a layer would give it
    for index in range(2):
        done: list[str] = []
        for stage in STAGES:
            hessians = oracle_hessians(model, packed, index, done if true_sequential else [])
            other = oracle_hessians(model, packed, index, [] if true_sequential else done)
            for path in stage:
                weight = kernel(model.params["layers"][index], path)
                hessian = hessians[path]
                found = kernel(packed.params["layers"][index], path)
                expected = gptq_solve(weight, hessian.astype(np.float32), SPEC, grid="minmax")
                np.testing.assert_array_equal(found.scales, expected.scales)
                same = np.mean(codes(found) == codes(expected))
                assert same >= 0.995, (index, path, same)
                if done:
                    control = gptq_solve(weight, other[path].astype(np.float32), SPEC, grid="minmax")
                    unlike.append(np.mean(codes(found) != codes(control)))
                error = np.asarray(weight, np.float64) - np.asarray(found.dequantize(), np.float64)
                loss = np.sum(error * (hessian @ error))
                layer = reports[f"layers.{index}.{path}"]
                assert layer.loss == pytest.approx(loss / layer.tokens, rel=1e-3)
                output = np.sum(np.asarray(weight) * (hessian @ np.asarray(weight, np.float64)))
                assert layer.relative_error == pytest.approx(np.sqrt(loss / output), rel=1e-3)
            done += stage
    assert min(unlike) > 0.02, "the control would have passed as well"


def test_report(model, quantized):
    packed, report = quantized
    assert [layer.path for layer in report.layers] == [f"layers.{i}.{path}" for i in range(2) for path in PATHS]
    tokens = sum(batch.size for batch in BATCHES)
    assert all(layer.tokens == tokens and layer.method == "gptq" and not layer.fell_back for layer in report.layers)
    assert all(0 < layer.loss < layer.rtn_loss for layer in report.layers)
    assert {layer.damping for layer in report.layers} == {0.01}
    assert set(report.kept_float) == {"embed", "head"}
    asked = {"order": "activation", "static_groups": True, "grid": "minmax", "damping": 0.01}
    assert report.settings == {"method": "gptq", **asked, "true_sequential": True}
    assert set(report.seconds) == {"read", "forward", "hessian", "solve", "measure", "write"}
    arrays = [kernel(block, path) for block in packed.params["layers"] for path in PATHS]
    assert report.bits_per_weight == pytest.approx(
        8 * sum(t.nbytes for t in arrays) / sum(t.d_in * t.d_out for t in arrays)
    )
    assert packed.report == report.to_json()
    assert is_quantized(packed)
    assert not is_quantized(model)


def test_the_quantized_model_is_near_the_float_one_and_nearer_than_rounding(model, quantized):
    rounded, _ = quantize(model, BATCHES, SPEC, rtn())
    logits, near, far = (np.asarray(each(BATCHES[0])) for each in (model, quantized[0], rounded))
    assert np.linalg.norm(near - logits) < 0.9 * np.linalg.norm(far - logits)
    assert np.linalg.norm(near - logits) < 0.5 * np.linalg.norm(logits)


def test_twice_is_byte_identical_and_compiles_nothing(model, quantized):
    again_model = build(CONFIG)
    with compilations() as compiled:
        again, _ = quantize(again_model, BATCHES, SPEC, gptq(grid="minmax"))
    assert compiled == []
    for one, other in zip(jax.tree.leaves(quantized[0].params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_padding_changes_nothing(model):
    lengths = (24, 17)
    rows = [BATCHES[0][row, :length] for row, length in enumerate(lengths)]
    tokens = np.zeros((2, 24), np.int32)
    mask = np.zeros((2, 24), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = True
    spec = replace(SPEC, bits=4)
    one_block = replace(model, config=replace(model.config, num_layers=1))
    one_block = replace(one_block, params={**model.params, "layers": model.params["layers"][:1]})
    padded, report = quantize(one_block, [Batch(tokens, mask)], spec, METHOD)
    apart, expected = quantize(one_block, [row[None] for row in rows], spec, METHOD)
    assert {layer.tokens for layer in report.layers} == {sum(lengths)}
    assert min(equal_codes(padded, apart).values()) >= 0.99
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert layer.rtn_loss == pytest.approx(other.rtn_loss, rel=1e-3)


def test_skips_overrides_and_shared_hessians(model, quantized):
    rules = SpecRules(
        default=SPEC,
        skip=("mlp", r"layers\.1"),
        overrides=(("k_proj", (("bits", 8),)), ("v_proj", (("group_size", 16), ("symmetric", False)))),
    )
    packed, report = quantize(model, BATCHES, rules, METHOD)
    specs = {layer.path.removeprefix("layers.0.self_attn."): layer.spec for layer in report.layers}
    assert specs == {
        "q_proj": SPEC,
        "k_proj": replace(SPEC, bits=8),
        "v_proj": replace(SPEC, group_size=16, symmetric=False),
        "o_proj": SPEC,
    }
    block = packed.params["layers"][0]
    assert {name: layer["kernel"].spec for name, layer in block["self_attn"].items()} == specs
    # The same Hessian as with one grid: q_proj's codes are what they were when k and v were solved with it.
    same = codes(block["self_attn"]["q_proj"]["kernel"]) == codes(
        quantized[0].params["layers"][0]["self_attn"]["q_proj"]["kernel"]
    )
    assert same.mean() >= 0.995
    for index, path in [(0, "mlp.up_proj"), (1, "self_attn.q_proj")]:
        assert kernel(packed.params["layers"][index], path) is kernel(model.params["layers"][index], path)
        assert report.kept_float[f"layers.{index}.{path}"] == "skipped by a rule"
    assert len(report.kept_float) == 3 + 7 + 2
    assert kernel(packed.params["layers"][1], "mlp.up_proj") is kernel(model.params["layers"][1], "mlp.up_proj")


def with_kernel(model, path, value):
    """`model` with the kernel at "layers.0.self_attn.q_proj" or so replaced."""
    _, index, part, name = path.split(".")
    layers = list(model.params["layers"])
    block = layers[int(index)]
    layers[int(index)] = {**block, part: {**block[part], name: {**block[part][name], "kernel": value}}}
    return replace(model, params={**model.params, "layers": layers})


def never(*_):
    raise AssertionError("work was done before the error")


def test_nan_weights_are_named_before_the_work(model, monkeypatch):
    monkeypatch.setattr("gptq_jax.pipeline.quantize_block", never)
    weight = kernel(model.params["layers"][1], "mlp.up_proj")
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp\.up_proj\.kernel holds NaN or infinity"):
        quantize(with_kernel(model, "layers.1.mlp.up_proj", weight.at[3, 4].set(jnp.nan)), BATCHES, SPEC, METHOD)


@pytest.mark.parametrize(("value", "message"), [(0.0, "are all zero"), (1e30, "hold NaN or infinity")])
def test_layers_fed_nothing_or_infinity_stop_the_run_by_name(model, value, message):
    weight = kernel(model.params["layers"][0], "self_attn.v_proj")
    broken = with_kernel(model, "layers.0.self_attn.v_proj", jnp.full_like(weight, value))
    rules = SpecRules(default=SPEC, skip=("q_proj", "k_proj", "v_proj"))
    with pytest.raises(ValueError, match=rf"the inputs of layers\.0\.self_attn\.o_proj {message}"):
        quantize(broken, BATCHES, rules, METHOD)


def test_layers_that_miss_tokens_stop_the_run_by_name(model, monkeypatch):
    whole = BlockForward.capture

    def half(*args, **kwargs):
        return {path: value[:1] for path, value in whole(*args, **kwargs).items()}

    monkeypatch.setattr(BlockForward, "capture", half)
    names = ", ".join(f"layers.0.{path}" for path in STAGES[0])
    with pytest.raises(ValueError, match=f"^{names} saw 48 tokens, but the calibration has 144"):
        quantize(model, BATCHES, SPEC, METHOD)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([np.zeros((0, 8), np.int32)], "pass at least one"),
        ([np.zeros(8, np.int32)], r"pass \[batch, time\]"),
        ([np.zeros((1, 8), np.float32)], "pass integers"),
        ([BATCHES[0], np.full((1, 8), 96)], r"tokens span 96\.\.96, but the vocabulary is 0\.\.95"),
        ([np.zeros((1, 129), np.int32)], "129 tokens exceed the model's context of 128"),
        ([Batch(np.zeros((2, 8), np.int32), np.ones((2, 7), bool))], "mask has shape"),
        ([Batch(np.zeros((2, 8), np.int32), np.zeros((2, 8), bool))], "are all zero"),
    ],
)
def test_bad_batches(model, batches, message):
    with pytest.raises(ValueError, match=message):
        quantize(model, batches, SPEC, METHOD)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (SpecRules(skip=("embedding",)), r"no layer matches 'embedding'; .* 'layers\.0\.self_attn\.q_proj'"),
        (SpecRules(overrides=(("lm_head", (("bits", 8),)),)), "no layer matches 'lm_head'"),
        (SpecRules(skip=("proj",)), r"skip=\['proj'\] leaves no layer"),
    ],
)
def test_bad_rules_stop_before_the_work(model, rules, message, monkeypatch):
    monkeypatch.setattr("gptq_jax.pipeline.quantize_block", never)
    with pytest.raises(ValueError, match=message):
        quantize(model, BATCHES, rules, METHOD)


def test_a_quantized_model_is_not_quantized_again(quantized):
    with pytest.raises(ValueError, match="quantized already: load the float one"):
        quantize(quantized[0], BATCHES, SPEC, METHOD)


def test_fallbacks_are_named_everywhere(model, quantized, tmp_path, monkeypatch):
    """A Hessian with a negative diagonal cannot be factored at any damping."""
    solve = METHOD.solve
    broken = METHOD._replace(solve=lambda weight, hessian, spec: solve(weight, -hessian, spec))
    rules = SpecRules(default=SPEC, skip=("mlp", r"layers\.1", "[qkv]_proj"))
    packed, report = quantize(model, BATCHES, rules, broken)
    path = "layers.0.self_attn.o_proj"
    assert report.fallbacks == (path,)
    assert report.layers[0].method == "rtn"
    shown = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=shown, width=80))
    terminal.summarize(report)
    assert f"rounded to nearest after all: {path}" in " ".join(shown.getvalue().split())
    assert "damping was raised" not in shown.getvalue()
    with terminal.layer_progress() as on_layer:
        on_layer(report.layers[0], 1, 1)
    assert f"{path} could not be solved and was rounded to nearest" in " ".join(shown.getvalue().split())
    save(packed, tmp_path / "out")
    assert load(tmp_path / "out").report == without_times(report.to_json())
    result = inspect_model(str(tmp_path / "out"))
    assert [layer["path"] for layer in result["layers"] if layer["fell_back"]] == [path]
    assert any(isinstance(line, str) and f"rounded to nearest: {path}" in line for line in inspection_table(result))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, s, spec: w, "solve returned .*, but must return a QuantizedTensor"),
        (lambda w, s, spec: rtn().solve(w[:, :-1], (), spec), r"shape \(48, 47\), but must keep \(48, 48\)"),
        (lambda w, s, spec: rtn().solve(w, (), replace(spec, bits=8)), r"bits=8.*, but must keep .*bits=3"),
        (lambda w, s, spec: replace(rtn().solve(w, (), spec), zeros=jnp.zeros((2, 96))), "zeros are stored"),
    ],
)
def test_methods_that_break_the_contract_are_named(model, answer, message):
    """Where the trial before the work, which is in test_contract.py, saw nothing: for one shape only."""

    def solve(w, s, spec):
        return answer(w, s, spec) if w.shape == (48, 48) else rtn().solve(w, (), spec)

    broken = METHOD._replace(solve=solve, name="broken")
    with pytest.raises(ValueError, match=f"method 'broken', for self_attn.o_proj: .*{message}"):
        quantize(model, BATCHES, SPEC, broken)


def test_progress_is_told(model):
    seen = []
    rules = SpecRules(default=SPEC, skip=("mlp", "[qk]_proj"))
    quantize(model, BATCHES, rules, rtn(), on_layer=lambda layer, done, total: seen.append((layer.path, done, total)))
    names = [f"layers.{i}.self_attn.{name}" for i in range(2) for name in ("v_proj", "o_proj")]
    assert seen == [(name, number, 4) for number, name in enumerate(names, 1)]


def test_the_inputs_kept_in_memory_are_bounded(model, quantized, monkeypatch):
    monkeypatch.setattr("gptq_jax.pipeline.KEPT_BYTES", 0)
    again, _ = quantize(model, BATCHES, SPEC, METHOD)
    assert min(equal_codes(again, quantized[0]).values()) >= 0.99


def test_bfloat16_models():
    packed, report = quantize(float_model(layers=1, dtype="bfloat16"), BATCHES, SPEC, METHOD)
    assert all(0 < layer.loss < layer.rtn_loss for layer in report.layers)
    assert packed(BATCHES[0]).dtype == jnp.float32
    assert packed.params["embed"]["embedding"].dtype == jnp.bfloat16
