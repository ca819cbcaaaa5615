import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_files import byte_vocabulary
from safetensors.numpy import save_file

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.safetensors import INDEX, SafetensorsDirectory
from gptq_jax.storage.tokenizer import gguf_tokenizer

CONFIG = {"model_type": "llama", "hidden_size": 64}
TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
    "b": np.arange(6, dtype=np.float16) / 4,
    "c": (np.arange(8).reshape(2, 4) / 2).astype(ml_dtypes.bfloat16),
}


def single(directory):
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, directory / "model.safetensors")
    return directory


def sharded(directory, **placed):
    """Shards with tensor a, and with b and c; `placed` overrides where the index says a tensor is."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    files = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b", "c"]}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **placed}}))
    return directory


@pytest.mark.parametrize("make", [single, sharded])
def test_tensors_come_as_stored(tmp_path, make):
    source = SafetensorsDirectory(make(tmp_path))
    assert source.config == CONFIG
    assert sorted(source.names()) == ["a", "b", "c"]
    for name, values in TENSORS.items():
        assert source.shape(name) == values.shape
        assert source.tensor(name).dtype == values.dtype
        np.testing.assert_array_equal(source.tensor(name), values)


def test_one_file_of_any_name(tmp_path):
    (single(tmp_path) / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert len(SafetensorsDirectory(tmp_path).names()) == 3


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "..\\x", 7])
def test_index_cannot_lead_out_of_the_directory(tmp_path, file):
    with pytest.raises(CheckpointError, match=r"index\.json: places tensor 'a' in .* not a plain file name"):
        SafetensorsDirectory(sharded(tmp_path, a=file))


def test_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names shard 'model-00002-of-00002\.safetensors', which is not there"):
        SafetensorsDirectory(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path):
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: lacks tensor 'z'"):
        SafetensorsDirectory(sharded(tmp_path, z="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="lacks tensor 'b'"):
        SafetensorsDirectory(sharded(tmp_path, b="model-00001-of-00002.safetensors"))


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'b' is also in model-00001-of-00002\.safetensors"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}', "{"])
def test_broken_index(tmp_path, index):
    (sharded(tmp_path) / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "{", "\xff", "[" * 100000])
def test_broken_config(tmp_path, config):
    (single(tmp_path) / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: is not"):
        SafetensorsDirectory(tmp_path)


def test_pickle_is_never_opened(tmp_path):
    (single(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: neither model\.safetensors nor"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .*never opened.*save_pretrained"):
        SafetensorsDirectory(tmp_path)


def test_several_files_need_an_index(tmp_path):
    (sharded(tmp_path) / INDEX).unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files but no"):
        SafetensorsDirectory(tmp_path)


def test_integer_tensors_are_refused_when_read(tmp_path):
    save_file({"codes": np.ones(3, np.int32)}, single(tmp_path) / "model.safetensors")
    source = SafetensorsDirectory(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'codes' is I32, not a float weight"):
        source.tensor("codes")


def _read_everything(directory: Path):
    source = SafetensorsDirectory(directory)
    for name in source.names():
        source.shape(name)
        source.tensor(name)


def test_truncation_and_damage_raise_nothing_but_checkpoint_errors(tmp_path):
    path = single(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    _read_everything(tmp_path)
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a whole safetensors file"):
            _read_everything(tmp_path)
    rng, refused = np.random.default_rng(0), 0
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(header)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            _read_everything(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_tokenizer(tmp_path):
    assert SafetensorsDirectory(single(tmp_path)).tokenizer() is None
    made = gguf_tokenizer(tmp_path, byte_vocabulary(["a b"]), context_length=32)
    made.save_pretrained(tmp_path)
    tokenizer = SafetensorsDirectory(tmp_path).tokenizer()
    assert tokenizer("ab 12<|end|>")["input_ids"] == made("ab 12<|end|>")["input_ids"]


@pytest.mark.parametrize("content", ["{", '{"model": {"type": "BPE"}}', "null"])
def test_broken_tokenizer(tmp_path, content):
    gguf_tokenizer(tmp_path, byte_vocabulary(), context_length=32).save_pretrained(single(tmp_path))
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        SafetensorsDirectory(tmp_path).tokenizer()


def test_tokenizer_without_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(single(tmp_path))
    with pytest.raises(CheckpointError, match="no vocabulary"):
        SafetensorsDirectory(tmp_path).tokenizer()
