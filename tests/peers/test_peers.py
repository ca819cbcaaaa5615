"""Exports of a real model, quantized here, in other people's libraries; CI runs these in their own environment."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptq_jax
from gptq_jax import QuantSpec, gptq, rtn

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1500)]

PROMPTS = ("The three primary colors are", "A list comprehension in Python is", "Once upon a time")
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 4
)
NEW_TOKENS = 32


@pytest.fixture(scope="session", autouse=True)
def peers():
    missing = [name for name in ("torch", "gptqmodel", "compressed_tensors") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: tests/peers/requirements-exports.txt lists what is needed")


@pytest.fixture(scope="session")
def model(smollm2_gguf):
    """SmolLM2-135M at 4 bits, by the solver, as a user would make it but with little calibration."""
    loaded = gptq_jax.load(smollm2_gguf)
    tokens = np.asarray(loaded.tokenizer(TEXT)["input_ids"], np.int32)[None, :96]
    return gptq_jax.quantize(loaded, [tokens], QuantSpec(bits=4, group_size=64), gptq(grid="minmax"))[0]


@pytest.fixture(scope="session")
def asymmetric(smollm2_gguf):
    """The same at 3 bits with zero points; which codes does not matter here, so they are rounded."""
    loaded = gptq_jax.load(smollm2_gguf)
    tokens = np.asarray(loaded.tokenizer(TEXT)["input_ids"], np.int32)[None, :16]
    return gptq_jax.quantize(loaded, [tokens], QuantSpec(bits=3, group_size=32, symmetric=False), rtn())[0]


def answers(kind, path, tokenizer, tmp_path):
    """Greedy continuations of PROMPTS, and the logits of TEXT, by another library."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, prompts))
    np.savez(
        tmp_path / "request.npz",
        prompts=np.array([[-1] * (longest - len(ids)) + ids for ids in prompts]),
        new_tokens=NEW_TOKENS,
        tokens=text_tokens(tokenizer).astype(np.int64),
    )
    child = [sys.executable, Path(__file__).with_name("peer_child.py"), kind, path]
    files = [tmp_path / "request.npz", tmp_path / "answer.npz"]
    result = subprocess.run([*map(str, [*child, *files])], capture_output=True, text=True, timeout=1400)
    assert result.returncode == 0, result.stderr[-3000:]
    return np.load(files[1])


def text_tokens(tokenizer):
    return np.asarray(tokenizer(TEXT)["input_ids"], np.int32)[None, :64]


def assert_agree(found, path):
    ours = gptq_jax.load(path)
    logits = np.asarray(ours(text_tokens(ours.tokenizer)))
    assert np.linalg.norm(found["logits"] - logits) < 1e-2 * np.linalg.norm(logits)
    for prompt, greedy in zip(PROMPTS, found["greedy"], strict=True):
        text = gptq_jax.generate(ours, prompt, max_new_tokens=NEW_TOKENS)
        assert ours.tokenizer.decode(greedy, skip_special_tokens=True) == text


def test_gptqmodel(model, tmp_path):
    gptq_jax.export(model, tmp_path / "out", format="gptq")
    found = answers("gptqmodel", tmp_path / "out", model.tokenizer, tmp_path)
    assert found["kernel"] == "TorchLinear"  # packed, not a float layer
    assert_agree(found, tmp_path / "out")


def test_gptqmodel_asymmetric_in_three_bits(asymmetric, tmp_path):
    gptq_jax.export(asymmetric, tmp_path / "out", format="gptq_v2", max_shard_size="60MB")
    found = answers("gptqmodel", tmp_path / "out", asymmetric.tokenizer, tmp_path)
    assert found["kernel"] == "TorchLinear"
    assert_agree(found, tmp_path / "out")


def test_transformers_gptq(model, tmp_path):
    gptq_jax.export(model, tmp_path / "out", format="gptq")
    found = answers("transformers", tmp_path / "out", model.tokenizer, tmp_path)
    assert found["kernel"] == "TorchLinear"
    assert_agree(found, tmp_path / "out")


@pytest.mark.parametrize("format", ["compressed-tensors", "float"])
def test_transformers(model, tmp_path, format):
    gptq_jax.export(model, tmp_path / "out", format=format)
    found = answers("transformers-plain", tmp_path / "out", model.tokenizer, tmp_path)
    assert_agree(found, tmp_path / "out")


@pytest.mark.parametrize("kind", ["symmetric, 4 bits", "asymmetric, 3 bits"])
def test_compressed_tensors_decompresses_to_the_same_weights(kind, model, asymmetric, tmp_path):
    quantized = model if kind.startswith("symmetric") else asymmetric
    gptq_jax.export(quantized, tmp_path / "out", format="compressed-tensors")
    child = [sys.executable, Path(__file__).with_name("decompress_child.py"), tmp_path / "out", tmp_path / "weights"]
    (tmp_path / "weights").mkdir()
    result = subprocess.run([*map(str, child)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    compared = 0
    for index, block in enumerate(quantized.params["layers"]):
        for part in ("self_attn", "mlp"):
            for name, layer in block[part].items():
                found = np.load(tmp_path / "weights" / f"model.layers.{index}.{part}.{name}.npy")
                np.testing.assert_array_equal(found.T, np.asarray(layer["kernel"].dequantize()))
                compared += 1
    assert compared == 210
