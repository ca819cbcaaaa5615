"""The whole job on a real language model, with Python's own documentation as text."""

import jax
import pytest
from decoder_models import floated

from gptq_jax import QuantSpec, gptq, load, perplexity, quantize, rtn, save
from gptq_jax.calibration import batches, sample_windows, token_stream
from gptq_jax.demo import python_documentation
from gptq_jax.generate import generate

pytestmark = pytest.mark.slow


def test_three_bits_keep_the_model_where_rounding_loses_it(smollm2_gguf, tmp_path):
    model = load(smollm2_gguf)
    train, held_out = python_documentation()
    windows = sample_windows(token_stream(train, model.tokenizer), samples=16, length=512, seed=0)
    tokens = token_stream(held_out, model.tokenizer)[: 12 * 512]
    spec = QuantSpec(bits=3, group_size=64, symmetric=False)

    def gap(candidate):
        return perplexity(floated(candidate), tokens, length=512, batch_size=4) - exact

    exact = perplexity(model, tokens, length=512, batch_size=4)
    solved, report = quantize(model, batches(windows, 8), spec, gptq())
    rounded, _ = quantize(model, batches(windows[:1], 1), spec, rtn())
    assert exact < 30
    assert report.fallbacks == ()
    assert all(layer.loss < layer.rtn_loss for layer in report.layers)
    # On wiki text with twice the calibration the published settings reach 0.31.
    assert gap(solved) < 0.45 * gap(rounded)

    save(solved, tmp_path / "store")
    reloaded = load(tmp_path / "store")
    pairs = zip(jax.tree.leaves(solved.params), jax.tree.leaves(reloaded.params), strict=True)
    assert all(bool((one == other).all()) for one, other in pairs)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(reloaded.params))
    on_disk = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file())
    tokenizer = sum((tmp_path / "store" / name).stat().st_size for name in ("tokenizer.json", "report.json"))
    assert on_disk - tokenizer < 1.03 * arrays
    text = generate(reloaded, "The Python statement that defines a function is", max_new_tokens=12)
    assert len(text) > 10
