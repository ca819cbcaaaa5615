"""Models and a tokenizer made in memory from tests/decoder_cases.py."""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import decoder_cases
import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from gptq_jax.models.base import Model
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.tensor import QuantizedTensor

TEXT = "the quick brown fox jumps over the lazy dog; äöü 世界 🙂. " * 4


def build(hf_config: dict, *, seed: int = 0, dtype: str = "float32", tokenizer: Any = None) -> Model:
    """A model with the case's random weights."""
    architecture = architecture_from_config(hf_config)
    tensors = decoder_cases.tensors(hf_config, seed)

    def leaf(path: tuple, expected: jax.ShapeDtypeStruct) -> jax.Array:
        keys = tuple(entry.idx if hasattr(entry, "idx") else entry.key for entry in path)
        name, transposed = architecture.tensor_name(keys)
        value = tensors.pop(name)
        value = value.T if transposed else value
        assert value.shape == expected.shape, name
        return jnp.asarray(value, dtype)

    params = jax.tree_util.tree_map_with_path(leaf, architecture.abstract_params())
    assert not tensors, f"no place for {sorted(tensors)}"
    return Model(architecture, params, tokenizer, hf_config)


def floated(model: Model) -> Model:
    """The same weights without packing, which a CPU multiplies faster when there are many tokens."""
    is_packed = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    params = jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, model.params, is_leaf=is_packed)
    return dataclasses.replace(model, params=params)


def write_directory(folder: Path, hf_config: dict) -> None:
    """The same with `byte_tokenizer`, as a checkpoint of Hugging Face's kind."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file(decoder_cases.tensors(hf_config), folder / "model.safetensors")
    byte_tokenizer().save_pretrained(folder)


@lru_cache
def byte_tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} [reply]{% endif %}"  # noqa: E501
    return fast
