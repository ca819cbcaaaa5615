"""The contract of every architecture, against transformers' own models of random weights."""

import tempfile
import textwrap
from functools import lru_cache
from pathlib import Path

import architecture_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptq_jax
from gptq_jax import QuantSpec, gptq
from gptq_jax.generate import generate_tokens
from gptq_jax.models import base
from gptq_jax.models.base import linear_paths, run_block
from gptq_jax.models.families.base import read_config
from gptq_jax.storage.load import open_source, read_params
from gptq_jax.storage.store import packed_layers

EVERY = sorted(set(cases.CONFIGS) - {cases.DOCUMENTED})
ONE_OF_EACH_FAMILY = [name for name in EVERY if "_" not in name.removeprefix("gpt_")] + ["opt_350m"]


def some(names, fast):
    """Cases, those that share their mechanism with a fast one marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


POSITIONS = some(EVERY, {"bloom", "gemma3", "gpt2", "gpt_neo", "gptj", "opt_350m", "phi3_long"})
QUANTIZED = some(ONE_OF_EACH_FAMILY, {"gpt2", "opt_350m"})
SPEC = QuantSpec(bits=4, group_size=16)


@lru_cache
def model(name):
    oracle = cases.oracle(name)
    with tempfile.TemporaryDirectory() as folder:
        return gptq_jax.load(cases.write_checkpoint(Path(folder), oracle["config"], oracle["tensors"]))


@lru_cache
def quantized(name):
    rng = np.random.default_rng(0)
    batches = [rng.integers(3, 48, (4, 24), dtype=np.int32) for _ in range(2)]
    return gptq_jax.quantize(model(name), batches, SPEC, gptq(grid="minmax"))


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def by_blocks(model, tokens, positions, mask=None, caches=None):
    """Logits at positions of one's own, with a padding mask or caches, which are replaced."""
    config = model.config
    x = base.embed(config, model.params, jnp.asarray(tokens), positions)
    for index, params in enumerate(model.params["layers"]):
        cache = None if caches is None else caches[index]
        x, cache = run_block(config, config.layer_kind(index), params, x, positions, cache, mask)
        if caches is not None:
            caches[index] = cache
    return np.asarray(base.head(config, model.params, x))


def in_steps(model, tokens, steps):
    """Logits of a text that comes in pieces, each seeing those before it through the caches."""
    caches = [model.config.init_cache(len(tokens), 64) for _ in model.params["layers"]]
    found, start = [], 0
    for time in steps:
        positions = jnp.arange(start, start + time, dtype=jnp.int32)[None]
        found.append(by_blocks(model, tokens[:, start : start + time], positions, caches=caches))
        start += time
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_transformers(name):
    logits = model(name)(cases.tokens(name))
    assert logits.dtype == jnp.float32
    assert relative(logits, cases.oracle(name)["logits"]) < 2e-5


@pytest.mark.parametrize("name", POSITIONS)
def test_padding_changes_nothing_for_real_tokens(name):
    found = by_blocks(model(name), cases.tokens(name), jnp.asarray(cases.positions()), mask=jnp.asarray(cases.mask()))
    real = cases.mask()
    assert relative(found[real], cases.oracle(name)["padded"][real]) < 2e-5
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", POSITIONS)
def test_a_text_in_pieces_has_the_logits_of_the_whole(name):
    tokens = cases.tokens(name)
    whole = np.asarray(model(name)(tokens))
    assert relative(in_steps(model(name), tokens, [4] * 5), whole) < 2e-5


def test_blocks_of_one_kind_are_compiled_once():
    config = model("gemma3").config
    assert [config.layer_kind(index)[:4] for index in range(4)] == ["slid", "slid", "full", "slid"]
    before = base._run_block._cache_size()
    model("gemma3")(np.full((1, 3), 5, np.int32))
    assert base._run_block._cache_size() == before + 2


@pytest.mark.parametrize("name", QUANTIZED)
def test_gptq_comes_closer_to_the_outputs_than_rounding(name):
    solved, report = quantized(name)
    blocks = range(solved.config.num_layers)
    paths = [f"layers.{i}.{path}" for i in blocks for path in linear_paths(solved.config, solved.config.layer_kind(i))]
    assert [layer.path for layer in report.layers] == paths
    assert sum(layer.loss for layer in report.layers) < 0.9 * sum(layer.rtn_loss for layer in report.layers)
    assert all(layer.loss <= 1.02 * layer.rtn_loss for layer in report.layers)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_is_stored_prepared_and_generates(name, tmp_path):
    solved, _ = quantized(name)
    gptq_jax.save(solved, tmp_path / "store")
    found = gptq_jax.load(tmp_path / "store")
    assert found.config == solved.config
    jax.tree.map(np.testing.assert_array_equal, found.params, solved.params)
    prompt = cases.tokens(name)[0]
    greedy = list(generate_tokens(found, prompt, max_new_tokens=4, stop_tokens=()))
    logits = np.asarray(solved(np.concatenate([prompt, greedy])[None]))[0, len(prompt) - 1 : -1]
    assert (logits.max(-1) - logits[np.arange(4), greedy] < 1e-3).all()  # the likeliest, but for a tie
    prepared = gptq_jax.prepare(found)
    assert relative(np.asarray(prepared(prompt[None])), np.asarray(solved(prompt[None]))) < 1e-5


def test_the_documented_family_has_the_logits_of_transformers(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "adding_a_model.md").read_text()
    code = page[page.index("```python") + 9 : page.index("   ```\n", page.index("```python") + 9)]
    exec(textwrap.dedent(code), found := {})
    oracle = cases.oracle(cases.DOCUMENTED)
    architecture = read_config(cases.DOCUMENTED, found["STABLELM"], oracle["config"])
    source = open_source(cases.write_checkpoint(tmp_path, oracle["config"], oracle["tensors"]))
    documented = base.Model(architecture, read_params(source, architecture))
    assert relative(documented(cases.tokens(cases.DOCUMENTED)), oracle["logits"]) < 2e-5
    with pytest.raises(ValueError, match="use_parallel_residual=True is not supported: only False is"):
        read_config(cases.DOCUMENTED, found["STABLELM"], {**oracle["config"], "use_parallel_residual": True})


@pytest.mark.parametrize("name", some(["gpt2", "opt_350m", "phi3", "gpt_neox"], {"gpt2", "opt_350m"}))
def test_exported_checkpoints_come_back_as_they_were(name, tmp_path):
    solved, _ = quantized(name)
    gptq_jax.export(solved, tmp_path / "out", format="gptq", dtype="float32")
    found = gptq_jax.load(tmp_path / "out")
    layers = packed_layers(found.params)
    for path, tensor in packed_layers(solved.params).items():
        np.testing.assert_array_equal(layers[path].codes, tensor.codes)
        np.testing.assert_array_equal(layers[path].dequantize(), tensor.dequantize())
    tokens = cases.tokens(name)
    assert relative(np.asarray(found(tokens)), np.asarray(solved(tokens))) < 1e-5
