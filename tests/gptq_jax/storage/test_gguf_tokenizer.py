import json
from pathlib import Path

import pytest
from gguf_files import byte_vocabulary, hf_tensors, write
from transformers import PreTrainedTokenizerFast

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.gguf import GgufFile
from gptq_jax.storage.tokenizer import SPLITTINGS, gguf_tokenizer

ORACLES = Path(__file__).parents[2] / "oracles"
SMOLLM2 = json.loads((ORACLES / "tokens_smollm2.json").read_text())
SENTENCEPIECE = json.loads((ORACLES / "tokens_sentencepiece.json").read_text())
PATH = Path("model.gguf")
MERGES = ["Ġ 1", "1 2", "12 3", "a b", "Ġ ab", "ab c", "d e", "Ġ Ġ"]


def build(metadata, **changes):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return gguf_tokenizer(PATH, {**metadata, **changes}, context_length=64)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def sentencepiece_metadata():
    metadata = {f"tokenizer.ggml.{key}": SENTENCEPIECE[key] for key in ("tokens", "scores", "token_type")}
    return {**metadata, "tokenizer.ggml.model": "llama"}


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "Ġ", "Ġab", "c"]),
        ("gpt-2", ["ab", "Ġ1", "2", "3", "4", "Ġ", "Ġab", "c"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4", "Ġ", "Ġab", "c"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "Ġ", "Ġab", "c"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4", "Ġ", "Ġab", "c"]),
    ],
)
def test_words_are_cut_as_the_pre_tokenizer_says(pre, expected):
    tokenizer = build(byte_vocabulary(MERGES[:-1]), pre=pre)
    assert pieces(tokenizer, "ab 1234  abc") == expected


@pytest.mark.parametrize("pre", sorted(SPLITTINGS))
def test_byte_level_round_trip(pre):
    tokenizer = build(byte_vocabulary(MERGES), pre=pre)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text, _ in SMOLLM2["pairs"]:
        if "\u0301" not in text or not SPLITTINGS[pre].normal_form:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_llama3_takes_whole_words_without_merging():
    vocabulary = byte_vocabulary(["a b"])
    vocabulary["tokenizer.ggml.tokens"].append("abcd")
    vocabulary["tokenizer.ggml.token_type"].append(1)
    assert pieces(build(vocabulary, pre="llama-bpe"), "abcd") == ["abcd"]
    assert pieces(build(vocabulary, pre="gpt-2"), "abcd") == ["ab", "c", "d"]


def test_qwen2_composes_characters():
    tokenizer = build(byte_vocabulary(), pre="qwen2")
    assert tokenizer.decode(tokenizer("e\u0301")["input_ids"]) == "é"


def test_control_and_user_tokens_are_found_in_text():
    vocabulary = byte_vocabulary()
    vocabulary["tokenizer.ggml.tokens"].append("<tool>")
    vocabulary["tokenizer.ggml.token_type"].append(4)
    tokenizer = build(vocabulary)
    found = tokenizer("a<|end|>b<tool>c")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == ["a", "<|end|>", "b", "<tool>", "c"]
    assert tokenizer.decode(found, skip_special_tokens=True) == "ab<tool>c"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert len(tokenizer) == len(vocabulary["tokenizer.ggml.tokens"])
    assert tokenizer.model_max_length == 64


def test_special_tokens_around_a_text():
    vocabulary = byte_vocabulary()
    assert pieces(build(vocabulary), "a") == ["a"]
    assert pieces(build(vocabulary, add_bos_token=True), "a") == ["<|begin|>", "a"]
    both = build(vocabulary, add_bos_token=True, add_eos_token=True)
    assert pieces(both, "a") == ["<|begin|>", "a", "<|end|>"]
    assert both("a", add_special_tokens=False)["input_ids"] == build(vocabulary)("a")["input_ids"]
    del vocabulary["tokenizer.ggml.add_bos_token"]
    assert pieces(build(vocabulary, pre="llama-bpe"), "a") == ["<|begin|>", "a"]
    assert pieces(build(vocabulary, pre="gpt-2"), "a") == ["a"]


def test_chat_template_and_saving(tmp_path):
    template = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
    metadata = {**byte_vocabulary(MERGES), "tokenizer.chat_template": template}
    tokenizer = build(metadata, add_bos_token=True)
    messages = [{"role": "user", "content": "abc 12"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|begin|>abc 12<|end|>"
    tokenizer.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text, _ in SMOLLM2["pairs"]:
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.apply_chat_template(messages, tokenize=False) == "<|begin|>abc 12<|end|>"
    assert (reloaded.bos_token, reloaded.eos_token) == ("<|begin|>", "<|end|>")


def test_sentencepiece_gives_sentencepieces_tokens():
    tokenizer = build(sentencepiece_metadata(), add_bos_token=False)
    for text, ids in SENTENCEPIECE["pairs"]:
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(SENTENCEPIECE["tokens"])


def test_sentencepiece_defaults_and_options():
    tokenizer = build(sentencepiece_metadata())
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert pieces(tokenizer, "float")[:2] == ["<s>", "▁f"]
    bare = build(sentencepiece_metadata(), add_space_prefix=False, add_bos_token=False)
    assert pieces(bare, "float") == ["float"]
    assert "<sep>" in pieces(bare, "a<sep>b")
    assert bare.decode(bare(" float")["input_ids"]) == " float"


def test_no_tokenizer_is_none(tmp_path):
    assert GgufFile(write(tmp_path / "model.gguf", hf_tensors())).tokenizer() is None


def test_tokenizer_of_a_file(tmp_path):
    tokenizer = GgufFile(write(tmp_path / "model.gguf", hf_tensors(), metadata=byte_vocabulary(MERGES))).tokenizer()
    assert pieces(tokenizer, "abc") == ["abc"]
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "t5"}, "'t5' is not supported; gpt2, llama are"),
        ({"pre": "new"}, "'new' is not known; .*smollm"),
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": "abc"}, "not an array of str"),
        ({"token_type": [1]}, "has 1 values for"),
        ({"merges": ["ab"]}, "'ab', which is not two tokens"),
        ({"merges": ["a zz"]}, "do not fit"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, but there are"),
        ({"add_bos_token": 1}, "not true or false"),
        ({"model": "llama"}, "no scores"),
    ],
)
def test_damaged_vocabularies(changes, problem):
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{problem}"):
        build(byte_vocabulary(), **changes)


def test_real_tokenizer(smollm2_gguf):
    tokenizer = GgufFile(smollm2_gguf).tokenizer()
    for text, ids in SMOLLM2["pairs"]:
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == 0
    assert pieces(tokenizer, "½²") == ["Â½", "Â²"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
