"""The whole job on Gemma 3 270M: norms before and after, local and global layers, a SentencePiece vocabulary."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from decoder_models import floated

from gptq_jax import QuantizedTensor, QuantSpec, generate, gptq, load, perplexity, quantize, rtn, save
from gptq_jax.calibration import batches, sample_windows, token_stream
from gptq_jax.demo import python_documentation
from gptq_jax.inspection import inspect_model
from gptq_jax.storage.gguf import GgufFile

pytestmark = pytest.mark.slow
TEXTS = (
    "Hello world",
    "  two  spaces,\ttabs\n\n\nand lines",
    "def f(x):\n        return x ** 2  # 12345\n",
    "äöü 世界 🙂 \x07 ☃",
    "<h1>A heading</h1> and <unused3> in it",
    "Supercalifragilisticexpialidocious, antidisestablishmentarianism.",
)


@pytest.fixture(scope="module")
def model(gemma3_gguf):
    return load(gemma3_gguf)


def pieces(text, metadata):
    """Tokens by llama.cpp's rules: whole tokens are cut out first, then the best pair of neighbours is joined."""
    tokens, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    ids = {token: index for index, token in enumerate(tokens)}
    whole = sorted((token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)), key=len)[::-1]
    parts = [(text, False)]
    for token in whole:
        if token in text:
            split = []
            for part, done in parts:
                pairs = [[(piece, False), (token, True)] for piece in part.split(token)] if not done else []
                split += [(part, True)] if done else [each for pair in pairs for each in pair][:-1]
            parts = [part for part in split if part[0]]
    found = []
    for part, done in parts:
        if done:
            found.append(ids[part])
            continue
        symbols = list(part.replace(" ", "▁"))
        while pairs := [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]:
            at = -max(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return [metadata["tokenizer.ggml.bos_token_id"], *found]


def test_tokenizer(gemma3_gguf):
    source = GgufFile(gemma3_gguf)
    tokenizer = source.tokenizer()
    for text in TEXTS:
        found = tokenizer(text)["input_ids"]
        assert found == pieces(text, source._metadata), text
        assert tokenizer.decode(found, skip_special_tokens="<unused" not in text).removeprefix("<bos>") == text
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_float_model(model):
    assert (
        generate(model, "The capital of France is Paris. The capital of Italy is", max_new_tokens=2).strip() == "Rome."
    )
    text = "The three primary colors are red, blue, and"
    assert generate(model, text, max_new_tokens=1) in (" yellow", " green")


@pytest.mark.timeout(1800)
def test_four_bits(model, tmp_path):
    train, held_out = python_documentation()
    windows = sample_windows(token_stream(train[:400_000], model.tokenizer), samples=8, length=256, seed=0)
    tokens = token_stream(held_out[:40_000], model.tokenizer)[: 4 * 256]
    spec = QuantSpec(bits=4, group_size=64)
    solved, report = quantize(model, batches(windows, 4), spec, gptq())
    rounded, _ = quantize(model, batches(windows[:1], 1), spec, rtn())
    assert report.fallbacks == ()
    assert len(report.layers) == 7 * 18
    assert all(layer.loss < layer.rtn_loss for layer in report.layers)
    models = (model, floated(solved), floated(rounded))
    exact, found, worse = (perplexity(each, tokens, length=256, batch_size=2) for each in models)
    assert exact < found < worse

    save(solved, tmp_path / "store")
    reloaded = load(tmp_path / "store")
    for one, other in zip(jax.tree.leaves(solved.params), jax.tree.leaves(reloaded.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert isinstance(reloaded.params["layers"][5]["mlp"]["down_proj"]["kernel"], QuantizedTensor)
    assert inspect_model(str(tmp_path / "store"))["quantized_layers"] == 7 * 18
    assert len(generate(reloaded, "The capital of France is", max_new_tokens=12)) > 10
