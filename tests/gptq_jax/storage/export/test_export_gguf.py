"""GGUF exports, read by the gguf package and by our own loader."""

import os

import decoder_cases
import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import TEXT, build
from export_models import CONFIG, TOKENS, packed_model

from gptq_jax import QuantSpec, load
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.export import export
from gptq_jax.storage.gguf import GgufFile


def stored(path):
    """Every tensor as the gguf package dequantizes it, and its type."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (gguf.quants.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type.name)
        for tensor in reader.tensors
    }


def in_llama_order(layer, weight):
    """[d_out, d_in], query and key rows as llama.cpp's converter leaves them."""
    heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}.get(layer.split(".")[-1])
    return weight.T if heads is None else gguf_files.permute(weight.T, heads)


@pytest.mark.parametrize(
    ("bits", "group_size", "type"),
    [(4, 32, "Q4_0"), (4, 64, "Q4_0"), (4, -1, "Q4_0"), (3, 32, "Q4_0"), (8, 32, "Q8_0")],
)
def test_symmetric_weights_are_exact(tmp_path, bits, group_size, type):
    model, weights = packed_model(QuantSpec(bits=bits, group_size=group_size))
    remarks = export(model, tmp_path / "m.gguf", format="gguf")
    assert any("3 bits take 4 bits each" in remark for remark in remarks) == (bits == 3)
    tensors = stored(tmp_path / "m.gguf")
    for layer, weight in weights.items():
        values, found = tensors[gguf_files.gguf_name(f"model.{layer}.weight")]
        assert found == type
        np.testing.assert_array_equal(values, in_llama_order(layer, weight).astype(np.float32))
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("bits", [2, 4])
def test_asymmetric_weights_are_exact_but_for_their_minimum(tmp_path, bits):
    spec = QuantSpec(bits=bits, group_size=32, symmetric=False)
    model, weights = packed_model(spec)
    remarks = export(model, tmp_path / "m.gguf", format="gguf")
    assert any("minima of asymmetric groups are rounded to float16" in remark for remark in remarks)
    tensors = stored(tmp_path / "m.gguf")
    for layer, weight in weights.items():
        values, found = tensors[gguf_files.gguf_name(f"model.{layer}.weight")]
        assert found == "Q4_1"
        step = np.asarray(model.params["layers"][0][layer.split(".")[-2]][layer.split(".")[-1]]["kernel"].scales)
        bound = 0.01 * in_llama_order(layer, step.astype(np.float64).repeat(32, axis=0))
        assert (np.abs(values - in_llama_order(layer, weight)) < bound).all()
        # Differences inside a block are codes times the scale, up to float32's own rounding.
        inside = np.diff(values.reshape(values.shape[0], -1, 32)) - np.diff(
            in_llama_order(layer, weight).reshape(values.shape[0], -1, 32)
        )
        assert np.abs(inside).max() < 1e-6


@pytest.mark.parametrize(("dtype", "type"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_what_is_not_packed(tmp_path, dtype, type):
    model, _ = packed_model(others={"self_attn.q_proj": None}, config={"attention_bias": True})
    bias = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    model.params["layers"][0]["self_attn"]["q_proj"]["bias"] = bias
    export(model, tmp_path / "m.gguf", format="gguf", dtype=dtype)
    tensors = stored(tmp_path / "m.gguf")
    embedding = np.asarray(model.params["embed"]["embedding"]).astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(tensors["token_embd.weight"][0], embedding)
    assert tensors["token_embd.weight"][1] == tensors["output.weight"][1] == tensors["blk.0.attn_q.weight"][1] == type
    # llama.cpp takes vectors in float32 only.
    assert tensors["output_norm.weight"][1] == tensors["blk.0.attn_q.bias"][1] == "F32"
    np.testing.assert_array_equal(tensors["blk.0.attn_q.bias"][0], gguf_files.permute(np.asarray(bias), 4))


@pytest.mark.parametrize("spec", [QuantSpec(group_size=32), QuantSpec(bits=3, group_size=-1)])
@pytest.mark.parametrize("tied", [True, False])
def test_our_own_loader_gives_the_same_logits(tmp_path, spec, tied):
    model, _ = packed_model(spec, config={"tie_word_embeddings": tied}, tokenizer=True)
    export(model, tmp_path / "m.gguf", format="gguf", dtype="float32")
    read = load(tmp_path / "m.gguf")
    assert read.config == model.config
    expected = np.asarray(model(TOKENS))
    np.testing.assert_allclose(read(TOKENS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["tied_gqa", "llama3_rope", "linear_rope", "yarn_rope", "head_dim", "mistral_window"])
def test_configurations_come_back(tmp_path, case):
    config = decoder_cases.CASES[case]
    model = build(config)
    export(model, tmp_path / "m.gguf", format="gguf", dtype="float32")
    read = load(tmp_path / "m.gguf")
    tokens = decoder_cases.tokens(case)
    np.testing.assert_allclose(read(tokens), model(tokens), rtol=0, atol=2e-5)
    expected = architecture_from_config(config)
    assert (read.config.rope.kind, read.config.sliding_window) == (expected.rope.kind, expected.sliding_window)


def test_metadata_that_readers_ask_for(tmp_path):
    export(packed_model(tokenizer=True)[0], tmp_path / "tiny.gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    values = {name: fields[name].contents() for name in fields}
    assert values["general.architecture"] == "llama"
    assert values["general.name"] == "tiny"
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert values["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert values["llama.rope.dimension_count"] == 16
    assert len(values["tokenizer.ggml.tokens"]) == CONFIG["vocab_size"]


def test_a_byte_level_tokenizer_comes_back(tmp_path):
    model, _ = packed_model(tokenizer=True)
    export(model, tmp_path / "m.gguf", format="gguf")
    read = load(tmp_path / "m.gguf").tokenizer
    for text in (TEXT, "123 45\n\n  <end>x's", "äöü 世界"):
        assert read(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert read.eos_token == "<end>"
    assert read.chat_template == model.tokenizer.chat_template
    kinds = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.token_type"].contents()
    # One control token, the alphabet with its merges, and rows of the embedding that no token has.
    assert (kinds[0], set(kinds[1:300]), set(kinds[300:])) == (3, {1}, {5})


def test_a_sentencepiece_tokenizer_comes_back(tmp_path):
    pieces = ["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "▁a", "ca", "▁ca"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    plain = 259
    order = {"he": 0, "▁t": 1, "▁the": 2, "▁a": 3, "ca": 4, "▁ca": 5}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * plain + [-float(order.get(piece, 100)) for piece in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    path = gguf_files.write(tmp_path / "old.gguf", gguf_files.hf_tensors(), metadata=metadata)
    made = GgufFile(path).tokenizer()
    from dataclasses import replace

    model = replace(packed_model()[0], tokenizer=made)
    export(model, tmp_path / "new.gguf", format="gguf")
    read = GgufFile(tmp_path / "new.gguf")
    kinds = gguf.GGUFReader(tmp_path / "new.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[: len(tokens)] == metadata["tokenizer.ggml.token_type"]
    for text in ("the cat", "a  thecaé\n世", "</s> the", ""):
        assert read.tokenizer()(text)["input_ids"] == made(text)["input_ids"], text
    assert made("the")["input_ids"][0] == 1


def test_a_tokenizer_gguf_has_no_words_for_is_refused(tmp_path):
    from dataclasses import replace

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model, _ = packed_model()
    with pytest.raises(ValueError, match="a WordLevel tokenizer has no place in GGUF"):
        export(
            replace(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words)),
            tmp_path / "m.gguf",
            format="gguf",
        )
    model, _ = packed_model(tokenizer=True)
    odd = model.tokenizer.backend_tokenizer
    before = odd.pre_tokenizer
    odd.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    try:
        with pytest.raises(ValueError, match="cuts text in a way that none of GGUF's pre-tokenizers"):
            export(model, tmp_path / "m.gguf", format="gguf")
    finally:
        odd.pre_tokenizer = before  # the tokenizer is shared with other tests
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("spec", "options", "reason"),
    [
        (QuantSpec(bits=8, group_size=32, symmetric=False), {}, "up_proj: no GGUF type holds 8 bits with zero points"),
        (QuantSpec(group_size=16), {}, "up_proj: groups of 16 are no multiple of the 32 inputs of a block"),
        (QuantSpec(group_size=40), {}, "up_proj: groups of 40 are no multiple"),
        (QuantSpec(group_size=32), {"ordered": False}, "up_proj: rows are in activation order"),
        (
            QuantSpec(group_size=-1),
            {"config": {"intermediate_size": 80}},
            "down_proj: 80 inputs are no multiple",
        ),
    ],
)
def test_grids_that_no_type_holds_are_refused(tmp_path, spec, options, reason):
    model, _ = packed_model(spec, others={"gate_proj": None, "self_attn": None}, **options)
    with pytest.raises(ValueError, match=f"this format cannot hold the model: .*{reason}"):
        export(model, tmp_path / "m.gguf", format="gguf")
    assert os.listdir(tmp_path) == []


def test_scales_and_parts_that_gguf_lacks_are_refused(tmp_path):
    from dataclasses import replace

    model, _ = packed_model(QuantSpec(group_size=32, scale_dtype="float32"))
    odd = jax.tree.map(lambda leaf: leaf * jnp.float32(1 + 1e-5) if leaf.shape == (2, 96) else leaf, model.params)
    with pytest.raises(ValueError, match="up_proj: the float32 scales are not float16 numbers"):
        export(replace(model, params=odd), tmp_path / "m.gguf", format="gguf")
    with pytest.raises(ValueError, match="hidden_act='gelu': llama in GGUF has silu only"):
        export(build(decoder_cases.CASES["biases"]), tmp_path / "m.gguf", format="gguf")


def test_one_file_that_is_replaced_with_care(tmp_path, monkeypatch):
    model, _ = packed_model()
    with pytest.raises(ValueError, match=r"does not end in \.gguf: a GGUF export is one file"):
        export(model, tmp_path / "out", format="gguf")
    export(model, tmp_path / "m.gguf", format="gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="exists: pass --overwrite"):
        export(model, tmp_path / "m.gguf", format="gguf")
    with monkeypatch.context() as patch:
        patch.setattr("gptq_jax.storage.export.gguf.sync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export(model, tmp_path / "m.gguf", format="gguf", dtype="float32", overwrite=True)
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before
    export(model, tmp_path / "m.gguf", format="gguf", dtype="float32", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() != before
    (tmp_path / "mine.gguf").write_text("not a model")
    with pytest.raises(FileExistsError, match="is no GGUF file, and is not replaced"):
        export(model, tmp_path / "mine.gguf", format="gguf", overwrite=True)
