"""Measurements are of the right thing; how long it takes is no test's business."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from gptq_jax.bench import decode, kernels, shapes, timing
from gptq_jax.bench.tables import compare_with_float, decode_table, kernel_table
from gptq_jax.bench.timing import Yardstick
from gptq_jax.cli import app
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.prepared import prepare
from gptq_jax.spec import QuantSpec
from pallas_kernels import api
from pallas_kernels.mosaic_gpu import rules, tuning
from pallas_kernels.weight import check_weight

TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=512,
)
YARDSTICK = Yardstick(device="cpu", dtype="float32", bytes_per_second=1e10, flops_per_second=1e11)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", 4096)
    monkeypatch.setattr(timing, "_LEAST_SECONDS", 1e-6)
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(timing, "measure_yardstick", lambda dtype=None: replace(YARDSTICK, dtype=dtype or "float32"))


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


# The loop


def test_the_loop_takes_every_product_of_every_weight():
    seen = []

    def product(x, weight):
        jax.debug.callback(lambda first: seen.append(float(first)), weight[0, 0])
        return x @ weight

    weights = [jnp.full((8, 4), float(n)) for n in (1, 2, 3)]
    seconds = timing.seconds_each(product, jnp.ones((2, 8)), weights, guess=1e-7, repeats=2)
    jax.effects_barrier()
    assert seconds > 0
    assert sorted(seen) == [1.0] * 9 + [2.0] * 9 + [3.0] * 9  # three runs of three rounds


def test_the_loop_is_not_cut_down_by_the_compiler():
    """The whole product is computed in each turn, though only one element is read of it."""
    x, weights = jnp.ones((64, 128)), [jnp.ones((128, 256)), jnp.full((128, 256), 2.0)]
    run = jax.jit(lambda x, weights: timing._chain(lambda x, w: x @ w, 5, x, weights))
    compiled = run.lower(x, weights).compile()
    assert compiled.cost_analysis()["flops"] >= 2 * 2 * 64 * 128 * 256
    np.testing.assert_array_equal(run(x, weights), x)


def test_weights_are_not_unpacked_before_the_loop():
    """Else a product in the loop would be one with a float weight, which a model's is not."""
    weights = [kernels.random_weight(jax.random.key(n), 1024, 1024) for n in range(4)]
    run = jax.jit(lambda x, weights: timing._chain(api.quantized_matmul, 100, x, weights))
    temporary = run.lower(jnp.ones((1, 1024)), weights).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 1024 * 1024


def test_weights_are_more_than_a_cache_holds(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", 100)
    assert [timing.copies_for(nbytes) for nbytes in (1, 10, 99, 1000)] == [timing.MOST_COPIES, 10, 2, 2]


def test_the_yardstick_measures_something_plausible():
    found = timing.Yardstick.floor(YARDSTICK, 2e10, 1e9)
    assert found == 2.0  # bytes decide
    assert YARDSTICK.floor(1.0, 3e11) == 3.0


def test_yardstick_of_this_machine(monkeypatch):
    monkeypatch.undo()
    found = timing.measure_yardstick(copy_bytes=1 << 22, size=128)
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e7 < found.flops_per_second < 1e16
    assert (found.device, found.dtype) == ("cpu", "float32")


# One product


@pytest.mark.parametrize("grid", [{}, {"symmetric": False, "bits": 3}, {"group_size": -1}, {"permuted": True}])
def test_random_weights_keep_the_layout_and_the_size_of_the_inputs(grid):
    weight = kernels.random_weight(jax.random.key(0), 512, 64, **grid)
    check_weight(weight)
    x = jax.random.normal(jax.random.key(1), (50, 512))
    size = float(jnp.std(api.quantized_matmul(x, weight)))
    assert 0.3 < size < 4


def test_a_product_is_measured_and_checked():
    row = kernels.measure_product(96, 40, 3, YARDSTICK, group_size=32, seed=0)
    assert row["implementation"] == "xla_tiled"
    assert row["relative_error"] < 1e-5
    assert row["speedup"] == pytest.approx(row["float_us"] / row["us"])
    nbytes = 96 * 40 / 2 + 2 * 3 * 40 + 4 * 3 * (96 + 40)
    assert row["floor_us"] == pytest.approx(1e6 * nbytes / 1e10)
    assert row["of_roofline"] == pytest.approx(row["floor_us"] / row["us"])
    assert {"d_in", "d_out", "tokens", "bits", "group_size", "dequantize_us", "weights_in_turn"} <= set(row)


def test_a_wrong_product_is_not_timed(monkeypatch):
    wrong = api.Implementation(
        lambda problem: None, lambda x, weight: 1.01 * api.IMPLEMENTATIONS["reference"].run(x, weight)
    )
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {**api.IMPLEMENTATIONS, "wrong": wrong})
    row = kernels.measure_product(96, 40, 3, YARDSTICK, group_size=32, implementation="wrong")
    assert row["relative_error"] == pytest.approx(0.01, rel=0.01)
    assert "not below 0.005: not timed" in row["failed"]
    assert "us" not in row


def test_a_failure_is_a_row_and_the_others_go_on(monkeypatch):
    def check(problem):
        if problem.tokens == 2:
            raise NotImplementedError("two tokens are too many.")

    picky = api.IMPLEMENTATIONS["reference"]._replace(check=check)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"picky": picky})
    rows = list(kernels.measure_shapes(TINY, [1, 2], YARDSTICK, group_size=16))
    assert [(row["product"], row["tokens"]) for row in rows] == [
        (name, tokens) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 2)
    ]
    assert all(("failed" in row) == (row["tokens"] == 2) for row in rows)
    assert "two tokens are too many" in rows[1]["failed"]
    assert "two tokens are too many" in kernel_table(rows).caption


def test_products_of_a_block_are_those_that_prepare_makes():
    model = prepare(decode.random_model(TINY, QuantSpec(group_size=16), "float32", 1))
    block = model.params["layers"][0]
    found = [fused.weight.problem for fused in block["fused"]]
    found += [block["self_attn"]["o_proj"]["kernel"].problem, block["mlp"]["down_proj"]["kernel"].problem]
    expected = shapes.products(TINY)
    assert {(problem.d_in, problem.d_out) for problem in found} == set(expected.values())


def test_tuning_needs_a_kernel_that_takes_tilings():
    with pytest.raises(NotImplementedError, match="xla_tiled runs here and takes no tiling"):
        kernels.tune(96, 40, 3, YARDSTICK)


def test_tuning_writes_the_fastest_that_is_right(monkeypatch, tmp_path):
    """A kernel whose result is wrong at one tiling, fails at another, and whose time its tiling decides."""
    monkeypatch.setenv("PALLAS_KERNELS_TUNED", str(tmp_path))
    reference = api.IMPLEMENTATIONS["reference"]
    tilings = [tuning.Tiling(stages=stages) for stages in (4, 3, 2, 1)]
    rule = rules.Rule(lambda problem: tilings[0], lambda problem: tilings)
    monkeypatch.setitem(rules.RULES, "mosaic_ampere", rule)
    problem = kernels.describe(kernels.random_weight(jax.random.key(0), 256, 64, group_size=32), 3, "float32")

    def run(x, weight):
        stages = tuning.choose("", problem, rule.choose).stages
        if stages == 2:
            raise ValueError("too much shared memory")
        return reference.run(x, weight) * (2 if stages == 1 else 1)

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"mosaic_ampere": reference._replace(run=run)})
    times = {4: 5e-6, 3: 2e-6}
    monkeypatch.setattr(
        kernels, "seconds_each", lambda *args, **kwargs: times[tuning.choose("", problem, rule.choose).stages]
    )
    row = kernels.tune(256, 64, 3, YARDSTICK, group_size=32)
    assert (row["us"], row["rule_us"]) == (pytest.approx(2), pytest.approx(5))
    assert len(row["failures"]) == 2
    assert tuning.choose("cpu", problem, rule.choose) == tilings[1]
    assert json.loads((tmp_path / "cpu.json").read_text())["entries"][0]["tokens"] == 8


# A whole model


def test_random_models_hold_what_their_shape_says():
    spec = QuantSpec(bits=4, group_size=16)
    packed, dense = (decode.random_model(TINY, each, "float32", 2) for each in (spec, None))
    assert len(packed.params["layers"]) == 2
    assert packed.params["layers"][0]["mlp"]["up_proj"]["kernel"].shape == (32, 48)
    assert jax.tree.map(jnp.shape, dense.params) == jax.tree.map(
        jnp.shape, replace(TINY, num_layers=2).abstract_params()
    )
    for model in (packed, dense):
        logits = model(np.arange(8, dtype=np.int32)[None])
        assert bool(jnp.all(jnp.isfinite(logits)))
        assert float(jnp.std(logits)) > 0.01


def test_decoding_counts_tokens_and_says_what_it_reckoned(monkeypatch):
    spec = QuantSpec(group_size=16)
    rows = list(decode.measure_decode(TINY, [1, 4], spec, steps=4, repeats=1))
    assert [row["batch"] for row in rows] == [1, 4]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert row["timed_step_ms"] == row["step_ms"]
        assert (row["layers_timed"], row["extrapolated"], row["implementations"]) == (3, False, ["xla_tiled"])
    seconds = {2: 5.0, 0: 1.0}
    monkeypatch.setattr(decode, "_seconds_a_step", lambda model, *rest: seconds[len(model.params["layers"])])
    (row,) = decode.measure_decode(TINY, [1], spec, layers=2)
    assert (row["extrapolated"], row["layers_timed"]) == (True, 2)
    assert row["timed_step_ms"] == 5000.0
    assert row["step_ms"] == 1000.0 + 4000.0 * 3 / 2
    assert "reckoned from the blocks that fit this memory (4-bit g16: 2 of 3 blocks)" in decode_table([row]).caption


def test_the_timed_loop_decodes_greedily():
    """The loop's tokens are those of whole forward passes over a context of the same cache: here, of zeros."""
    model = decode.random_model(TINY, None, "float32", 2)
    caches = [model.config.init_cache(2, 2 * decode.CONTEXT) for _ in range(2)]
    tokens = jnp.array([[3], [5]], jnp.int32)
    out, after = jax.jit(lambda *args: decode._decode(model.config, 3, *args))(model.params, tokens, caches)
    assert out.shape == (2, 1)
    filled = np.abs(np.asarray(after[0].values)).sum(axis=(0, 1, 3))
    assert (filled > 0).nonzero()[0].tolist() == [decode.CONTEXT + n for n in range(3)]
    one, _ = jax.jit(lambda *args: decode._decode(model.config, 1, *args))(model.params, tokens, caches)
    assert not np.array_equal(one, tokens)


def test_blocks_that_do_not_fit_are_not_made(monkeypatch):
    spec = QuantSpec(group_size=16)
    block = 4 * sum(leaf.size for leaf in jax.tree.leaves(TINY.abstract_params()["layers"][0]))
    monkeypatch.setattr(decode, "free_bytes", lambda: int((2.5 * block + 4 * 64 * 32 * 2) / 0.85))
    assert decode.layers_that_fit(TINY, None, "float32", 0) == 2
    assert decode.layers_that_fit(TINY, spec, "float32", 0) > 4
    monkeypatch.setattr(decode, "free_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="not one block of this shape fits the memory of cpu"):
        list(decode.measure_decode(TINY, [1], spec))


# The commands


def test_bench_kernels():
    result = run("bench", "kernels", "--shapes", "tiny", "--batch", "1,3", "--group-size", "16", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["yardstick"]["bytes_per_second"] == 1e10
    assert len(found["rows"]) == 8
    assert {row["implementation"] for row in found["rows"]} == {"xla_tiled"}
    assert {row["shape"] for row in found["rows"]} == {"tiny"}
    shown = run("bench", "kernels", "--shapes", "tiny", "--batch", "1", "--group-size", "16")
    assert "by xla_tiled" in shown.stdout
    assert "…" not in shown.stdout
    assert "cpu: copies 10 GB/s, multiplies 0.1 TFLOP/s in float32" in shown.stderr


def test_bench_decode():
    arguments = ("bench", "decode", "--shape", "tiny", "--batch", "1,2", "--group-size", "16", "--layers", "2")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["weights"], row["batch"]) for row in rows] == [
        (weights, batch) for weights in ("4-bit g16", "float32") for batch in (1, 2)
    ]
    assert rows[0]["speedup"] == pytest.approx(rows[2]["step_ms"] / rows[0]["step_ms"])
    assert "speedup" not in rows[2]
    assert all(row["extrapolated"] for row in rows)
    shown = run(*arguments, "--no-float")
    assert "* reckoned from the blocks that fit" in " ".join(shown.stdout.split())
    assert "xla_tiled" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--shapes", "llama-8b"), "shape 'llama-8b' is unknown: use one of llama-7b, "),
        (("kernels", "--batch", "1,x"), "--batch '1,x': pass positive numbers separated by commas"),
        (("decode", "--shape", "tiny", "--batch", "0"), "--batch '0': pass positive"),
        (("kernels", "--shapes", "tiny", "--batch", "1", "--bits", "5"), "bits=5 is not supported"),
        (("kernels", "--shapes", "tiny", "--batch", "1", "--tune"), "xla_tiled runs here and takes no tiling"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_speedup_needs_the_float_model_at_the_same_batch():
    rows = [
        {"implementations": ["xla_tiled"], "batch": 1, "step_ms": 2.0},
        {"implementations": ["xla_tiled"], "batch": 8, "step_ms": 2.0},
        {"implementations": ["xla"], "batch": 1, "step_ms": 5.0},
    ]
    assert [row.get("speedup") for row in compare_with_float(rows)] == [2.5, None, None]
