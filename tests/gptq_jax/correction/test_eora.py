"""Low-rank corrections: the paper's factors by numpy in float64, the Hessian of the corrected model, nearer outputs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import SPEC, batches
from expert_models import float_model as expert_model
from tiny_quantization import BATCHES, float_model, rounded

import gptq_jax
from gptq_jax import QuantSpec, eora, lora, merge_lora, with_lora
from gptq_jax.calibration import Batch
from gptq_jax.correction import bits_per_weight
from gptq_jax.correction import low_rank as low_rank_file
from gptq_jax.correction.low_rank import low_rank, stacked_experts
from gptq_jax.hooks.nnx import kernel_of
from gptq_jax.models.base import capture_block, embed, run_block
from gptq_jax.observe import observe
from gptq_jax.rewrites import hadamard
from gptq_jax.storage.progress import Progress

GRID = QuantSpec(bits=3, group_size=24, scale_dtype="float16")


@pytest.fixture(scope="module")
def model():
    return float_model()


@pytest.fixture(scope="module")
def quantized(model):
    return rounded(model, GRID, "attn|up_proj|down_proj")


@pytest.fixture(scope="module")
def told(model, quantized):
    """Adapters of rank 4, and what was told of each layer."""
    layers = []
    found = eora(model, quantized, BATCHES, 4, on_layer=lambda *each: layers.append(each))
    return found, layers


@pytest.fixture(scope="module")
def adapters(told):
    return told[0]


def problem(d_in, d_out, tokens, seed=0):
    """A residual, and the Hessian of inputs some of which hardly ever fire and some never."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, d_in)) * np.geomspace(1, 1e-3, d_in) @ rng.normal(size=(d_in, d_in))
    x[:, :2] = 0
    return rng.normal(size=(d_in, d_out)), x.T @ x


def damped(hessian):
    return hessian + np.diag(0.01 * np.mean(np.diag(hessian)) + (np.diag(hessian) == 0))


def by_the_paper(error, hessian, rank):
    """The product of its factors, V L^-1/2 U_r S_r and V_r^T, and the squares of the singular values left out."""
    values, vectors = np.linalg.eigh(hessian)
    u, s, vt = np.linalg.svd(np.sqrt(values)[:, None] * vectors.T @ error, full_matrices=False)
    a = vectors / np.sqrt(values) @ u[:, :rank] * s[:rank]
    return a @ vt[:rank], (s[rank:] ** 2).sum()


@pytest.mark.parametrize(("d_in", "d_out", "tokens"), [(40, 28, 400), (28, 40, 400), (40, 28, 15)])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_paper_s_factors_which_are_the_best_of_their_rank(d_in, d_out, tokens, rank):
    error, hessian = problem(d_in, d_out, tokens)
    a, b = (np.float64(each) for each in low_rank(jnp.float32(error), jnp.float32(hessian), rank))
    assert (a.shape, b.shape) == ((d_in, rank), (rank, d_out))
    hessian = damped(hessian)
    expected, tail = by_the_paper(error, hessian, rank)
    left = error - a @ b
    assert np.trace(left.T @ hessian @ left) == pytest.approx(tail, rel=1e-4)
    np.testing.assert_allclose(a @ b, expected, atol=0.01 * np.abs(expected).max())


def test_nearly_the_best_where_singular_values_hardly_fall():
    """What the iteration leaves to be desired where directions are worth almost the same."""
    error = np.random.default_rng(1).normal(size=(300, 240))
    a, b = low_rank(jnp.float32(error), jnp.eye(300), 8)
    tail = (np.linalg.svd(error, compute_uv=False)[8:] ** 2).sum()
    assert tail * 0.999 < np.sum((error - np.float64(a) @ np.float64(b)) ** 2) < 1.002 * tail


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 28), (28, 20)])
def test_the_whole_rank_is_the_whole_residual(d_in, d_out):
    """Of inputs that never fired too, about which the Hessian says nothing."""
    error, hessian = problem(d_in, d_out, 300)
    a, b = low_rank(jnp.float32(error), jnp.float32(hessian), 20)
    np.testing.assert_allclose(np.float64(a) @ np.float64(b), error, atol=2e-4)


def test_a_hessian_that_cannot_be_factored_counts_for_nothing():
    error, _ = problem(20, 12, 30)
    a, b = low_rank(jnp.float32(error), -jnp.eye(20), 3)
    u, s, vt = np.linalg.svd(error)
    np.testing.assert_allclose(np.float64(a) @ np.float64(b), u[:, :3] * s[:3] @ vt[:3], atol=1e-4)


def inputs(model, tokens, index, inside):
    """Of the layer `inside` of a block, [tokens, d_in]."""
    kind, blocks = model.config.layer_kind, model.params["layers"]
    x = embed(model.config, model.params, jnp.asarray(tokens))
    for before in range(index):
        x, _ = run_block(model.config, kind(before), blocks[before], x)
    seen = capture_block(model.config, kind(index), blocks[index], x, (inside,))[inside]
    return np.float64(seen).reshape(-1, seen.shape[-1])


@pytest.fixture(scope="module")
def towards_qep(model, quantized):
    return eora(model, quantized, BATCHES, 4, alpha=0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("path", ["layers.0.self_attn.o_proj", "layers.1.mlp.up_proj"])
def test_each_layer_is_corrected_for_what_its_corrected_predecessors_give_it(
    model, quantized, adapters, towards_qep, path, alpha
):
    adapters = towards_qep if alpha else adapters
    order = list(adapters)
    merged = merge_lora(quantized, {before: adapters[before] for before in order[: order.index(path)]})
    _, index, inside = path.split(".", 2)
    index = int(index)
    hessian = drift = 0
    for tokens in BATCHES:
        rows, wanted = (inputs(each, tokens, index, inside) for each in (merged, model))
        hessian += rows.T @ rows
        drift += rows.T @ (wanted - rows)
    weight = np.float64(kernel_of(model.params["layers"][index], inside))
    weight += alpha * np.linalg.solve(damped(hessian), drift @ weight)
    error = weight - np.float64(kernel_of(quantized.params["layers"][index], inside).dequantize())
    expected, tail = by_the_paper(error, damped(hessian), 4)
    left = error - np.float64(adapters[path].weight())
    assert np.trace(left.T @ damped(hessian) @ left) == pytest.approx(tail, rel=1e-3)
    np.testing.assert_allclose(adapters[path].weight(), expected, atol=0.02 * np.abs(expected).max())


def test_what_is_told_of_each_layer(told):
    adapters, layers = told
    assert {added.a.dtype.name for added in adapters.values()} == {"float16"}
    assert [(layer.path, done, total) for layer, done, total in layers] == [
        (path, number, 12) for number, path in enumerate(adapters, 1)
    ]
    assert all(layer.corrected_error < 0.9 * layer.error for layer, *_ in layers)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_run_goes_on_with_the_bits_of_one_in_peace(model, quantized, told, towards_qep, alpha, tmp_path, monkeypatch):
    """Stopped in the second block: the first is not solved again, and the second sees what it saw before."""
    monkeypatch.setattr("gptq_jax.storage.progress.EVERY", 0.0)

    def stop(layer, done, total):
        if done == 8:
            raise KeyboardInterrupt

    first = Progress(tmp_path / "kept", {}, steps="blocks")
    with pytest.raises(KeyboardInterrupt):
        eora(model, quantized, BATCHES, 4, alpha=alpha, progress=first, on_layer=stop)
    assert first.kept() == "1 blocks are kept; the same command goes on"
    layers, observed = [], []
    again = Progress(tmp_path / "kept", {}, steps="blocks")
    monkeypatch.setattr(low_rank_file, "observe", lambda *one, **more: observed.append(one[0]) or observe(*one, **more))
    resumed = eora(
        model, quantized, BATCHES, 4, alpha=alpha, progress=again, on_layer=lambda *each: layers.append(each)
    )
    assert {block.prefix for block in observed} == {"layers.1."}
    for path, added in (towards_qep if alpha else told[0]).items():
        np.testing.assert_array_equal(resumed[path].a, added.a)
        np.testing.assert_array_equal(resumed[path].b, added.b)
    if not alpha:
        assert layers == told[1]


def test_outputs_come_nearer_with_the_rank(model, quantized, adapters):
    """On other tokens; with all of the rank, the layers that it is whole for are the float ones."""
    tokens = np.random.default_rng(9).integers(0, 96, (3, 24), dtype=np.int32)
    most = eora(model, quantized, BATCHES, 24)
    expected = np.asarray(model(tokens))
    models = [merge_lora(quantized, found) for found in ({}, adapters, most)]
    distances = [np.square(np.asarray(found(tokens)) - expected).mean() for found in models]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.2 * distances[0]
    for index, inside in ((0, "self_attn.k_proj"), (1, "self_attn.v_proj")):  # 24 outputs
        whole = kernel_of(models[2].params["layers"][index], inside)
        np.testing.assert_allclose(whole, kernel_of(model.params["layers"][index], inside), atol=2e-4)


def test_only_some_layers(model, quantized, adapters):
    found = eora(model, quantized, BATCHES, 4, targets=r"0\.self_attn\.[qk]_proj")
    assert set(found) == {"layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"}
    for path, added in found.items():
        np.testing.assert_array_equal(added.a, adapters[path].a)
        np.testing.assert_array_equal(added.b, adapters[path].b)


def test_padding_does_not_count(model, quantized, adapters):
    beside = ((0, 0), (0, 5))
    padded = [Batch(np.pad(tokens, beside), np.pad(np.ones_like(tokens, bool), beside)) for tokens in BATCHES]
    found = eora(model, quantized, padded, 4, targets="layers.0.self_attn.q_proj")
    (path,) = found
    np.testing.assert_allclose(found[path].weight(), adapters[path].weight(), atol=1e-4)


def test_bits_per_weight(quantized, adapters):
    """12 layers of 3 bits and a float16 scale for 24 weights; a number of the factors has 16 bits."""
    shapes = [(added.a.shape[0], added.b.shape[1]) for added in adapters.values()]
    weights = sum(d_in * d_out for d_in, d_out in shapes)
    packed = sum((32 * -(-3 * d_in // 32) + 16 * -(-d_in // 24)) * d_out for d_in, d_out in shapes)
    alone, corrected = bits_per_weight(quantized, adapters)
    assert alone == pytest.approx(packed / weights)
    assert corrected - alone == pytest.approx(16 * 4 * sum(map(sum, shapes)) / weights)


def test_stored_by_peft_s_format(quantized, adapters, tmp_path):
    gptq_jax.save_lora(adapters, quantized, tmp_path / "adapter")
    again = gptq_jax.load_lora(tmp_path / "adapter", quantized)
    expected = with_lora(quantized, adapters)(BATCHES[0])
    np.testing.assert_array_equal(with_lora(quantized, again)(BATCHES[0]), expected)
    np.testing.assert_allclose(merge_lora(quantized, adapters)(BATCHES[0]), expected, rtol=2e-4, atol=2e-5)


def test_stacked_experts_are_left_as_they_are():
    model = expert_model("qwen3moe")
    quantized = rounded(model, SPEC, "q_proj|experts.down_proj")
    assert set(eora(model, quantized, batches(1), 2)) == {f"layers.{n}.self_attn.q_proj" for n in range(2)}
    assert stacked_experts(quantized) == [f"layers.{n}.mlp.experts.down_proj" for n in range(2)]
    with pytest.raises(ValueError, match=r"targets='experts' matches no packed layer: they are named like 'layers\.0"):
        eora(model, quantized, batches(1), 2, targets="experts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0 must be positive"),
        ({"rank": 30}, r"rank=30 is more than the 24 that layers\.0\.self_attn\.k_proj can have"),
        ({"targets": "gate_proj"}, "targets='gate_proj' matches no packed layer"),
        ({"targets": "("}, r"targets='\(' is not a regular expression"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_arguments(model, quantized, arguments, message):
    with pytest.raises(ValueError, match=message):
        eora(model, quantized, **{"batches": BATCHES, **arguments})


def test_models_that_do_not_belong_together(model, quantized):
    def refused(floating, packed, message):
        with pytest.raises(ValueError, match=message):
            eora(floating, packed, BATCHES, 4)

    refused(model, model, "holds no packed layers that could have a correction")
    refused(quantized, quantized, "quantized already")
    refused(float_model(layers=1), quantized, "has 2 blocks, the float one 1")
    refused(model, gptq_jax.prepare(quantized), "prepared to run here: correct the one it was prepared from")
    refused(model, with_lora(quantized, lora(quantized, 2)), "carries LoRA adapters, and cannot be corrected")
    wide = jax.tree.map(lambda leaf: leaf, model.params)
    wide["layers"][1]["input_layernorm"]["scale"] = 1.5 * wide["layers"][1]["input_layernorm"]["scale"]
    refused(replace(model, params=wide), quantized, r"layers\.1\.input_layernorm\.scale is another .* awq, smooth")
    refused(model, rounded(float_model(case="biases"), GRID), r"layers\.0.* is another in the quantized model")
    one, other = (hadamard(seed).apply(model, BATCHES, None) for seed in (0, 1))
    refused(other, rounded(one, GRID), "embed is another .* that was rotated before")
    refused(model, rounded(one, GRID), "embed is another .* that was rotated before")
    assert eora(one, rounded(one, GRID, "q_proj"), BATCHES, 4)
