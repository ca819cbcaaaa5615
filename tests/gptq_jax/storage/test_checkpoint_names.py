"""Checkpoints whose tensors have another base than ours, or constants that the model computes."""

import json

import architecture_cases as cases
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.load import load


def written(folder, name, rename, config=None, extra=None):
    oracle = cases.oracle(name)
    folder.mkdir(exist_ok=True)
    tensors = {rename(key): value for key, value in cases.tensors(oracle["tensors"]).items()}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or oracle["config"]))
    return load(folder)


def same(tensor):
    return tensor


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_models_saved_without_their_head(tmp_path):
    whole = written(tmp_path / "whole", "gpt2", same)
    masks = {f"h.{index}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for index in range(2)}
    bare = written(tmp_path / "bare", "gpt2", lambda name: name.removeprefix("transformer."), extra=masks)
    assert_equal(bare, whole)


@pytest.mark.parametrize("base", ["language_model.model.", "model.language_model."])
def test_a_language_model_among_others(tmp_path, base):
    whole = written(tmp_path / "whole", "gemma3", same)
    config = {"model_type": "gemma3", "text_config": cases.oracle("gemma3")["config"]}
    tower = {"vision_tower.vision_model.post_layernorm.weight": np.ones(4, np.float32)}
    found = written(tmp_path / "two", "gemma3", lambda name: base + name.removeprefix("model."), config, tower)
    assert_equal(found, whole)


def test_a_stored_copy_of_a_tied_head(tmp_path):
    tensors = cases.tensors(cases.oracle("gpt2")["tensors"])
    table = tensors["transformer.wte.weight"]
    found = written(tmp_path / "copy", "gpt2", same, extra={"lm_head.weight": table})
    assert_equal(found, written(tmp_path / "whole", "gpt2", same))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte.weight though"):
        written(tmp_path / "other", "gpt2", same, extra={"lm_head.weight": table + 1})


def test_what_is_missing_is_named_as_we_name_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is missing"):
        written(tmp_path / "x", "gpt2", lambda name: name.replace("transformer.", "decoder."))
