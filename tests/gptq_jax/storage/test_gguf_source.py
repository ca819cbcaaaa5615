import math
import struct

import gguf
import gguf_files
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import HIDDEN, KV_HEADS, LAYERS, byte_vocabulary, hf_tensors, write

from gptq_jax.storage.base import BFLOAT16, CheckpointError
from gptq_jax.storage.gguf import GgufFile
from gptq_jax.storage.gguf_header import read_header

# The largest error over the largest weight of a block: half a step of a grid that has to hold both ends.
BLOCK_ERROR = {
    Type.Q8_0: 0.6 / 127,
    Type.Q4_0: 1.01 / 8,
    Type.Q4_1: 1.05 / 15,
    Type.Q5_0: 1.01 / 16,
    Type.Q5_1: 1.05 / 31,
}


@pytest.mark.parametrize(
    ("type", "dtype"), [(Type.F32, np.float32), (Type.F16, np.float16), (Type.BF16, BFLOAT16)], ids=str
)
def test_float_tensors_come_as_stored_in_hugging_face_order(tmp_path, type, dtype):
    tensors = hf_tensors(biases=True)
    source = GgufFile(write(tmp_path / "model.gguf", tensors, type=type))
    assert set(source.names()) == set(tensors)
    for name, values in tensors.items():
        stored = dtype if values.ndim == 2 else np.float32
        found = source.tensor(name)
        assert found.dtype == stored
        assert source.shape(name) == values.shape
        np.testing.assert_array_equal(found, values.astype(stored), err_msg=name)


@pytest.mark.parametrize("type", BLOCK_ERROR, ids=lambda type: type.name)
def test_quantized_tensors_are_near_the_weights(tmp_path, type):
    tensors = hf_tensors()
    source = GgufFile(write(tmp_path / "model.gguf", tensors, type=type))
    for name, values in tensors.items():
        found = source.tensor(name)
        assert found.dtype == np.float32
        assert found.shape == values.shape
        if values.ndim == 2:
            blocks, error = values.reshape(-1, 32), (found - values).reshape(-1, 32)
            assert np.all(np.abs(error).max(1) <= BLOCK_ERROR[type] * np.abs(blocks).max(1)), name


def _half(values):
    return np.asarray(values, np.float16).view(np.uint8).reshape(len(values), 2)


def _k_blocks(type, scale, minimum):
    """One 256-weight block for each of `scale`, all of whose weights have one known value."""
    rows = len(scale)

    def fill(count, byte):
        return np.full((rows, count), byte, np.uint8)

    if type == Type.Q6_K:  # low bits 5, high bits 1, scales 1: 5 + 16 - 32
        return np.hstack([fill(128, 0x55), fill(64, 0b01010101), fill(16, 1), _half(scale)]), -11 * scale
    head = [_half(scale), _half(minimum), fill(8, 1), fill(4, 0x11)]  # every 6-bit scale and minimum is 1
    if type == Type.Q4_K:
        return np.hstack([*head, fill(128, 0x33)]), 3 * scale - minimum
    return np.hstack([*head, fill(32, 0xFF), fill(128, 0x33)]), 19 * scale - minimum


@pytest.mark.parametrize("type", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda type: type.name)
def test_k_quants(tmp_path, type):
    rows, columns = 6, 2
    scale, minimum = np.exp2(np.arange(12) - 6.0), 2.0 + np.arange(12)
    blocks, expected = _k_blocks(type, scale, minimum)
    raw = {"blk.0.ffn_down.weight": (blocks.reshape(rows, -1), type)}
    tensors = hf_tensors()
    del tensors["model.layers.0.mlp.down_proj.weight"]
    source = GgufFile(write(tmp_path / "model.gguf", tensors, raw=raw))
    found = source.tensor("model.layers.0.mlp.down_proj.weight")
    assert found.shape == source.shape("model.layers.0.mlp.down_proj.weight") == (rows, 256 * columns)
    np.testing.assert_allclose(found, np.repeat(expected, 256).reshape(found.shape), rtol=1e-6)


def test_unsupported_type_is_named(tmp_path):
    raw = {"blk.0.ffn_down.weight": (np.zeros((2, 84), np.uint8), Type.Q2_K)}
    with pytest.raises(CheckpointError, match=r"model\.gguf: tensor 'blk.0.ffn_down.weight' is Q2_K.*Q8_0.*Q6_K can"):
        GgufFile(write(tmp_path / "model.gguf", {"model.embed_tokens.weight": np.ones((2, 32))}, raw=raw))


def test_config(tmp_path):
    ids = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
    }
    config = GgufFile(write(tmp_path / "model.gguf", hf_tensors(), metadata=ids)).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": gguf_files.VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": gguf_files.D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": gguf_files.HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": gguf_files.HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": None,
    }


def test_config_of_other_layouts(tmp_path):
    metadata = {
        "llama.attention.sliding_window": 32,
        "llama.attention.head_count_kv": None,
        "llama.rope.dimension_count": None,
        "llama.rope.freq_base": None,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    config = GgufFile(write(tmp_path / "model.gguf", hf_tensors(tied=True, biases=True), metadata=metadata)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)
    assert config["attention_bias"]
    assert config["mlp_bias"]
    assert config["tie_word_embeddings"]
    assert (config["num_key_value_heads"], config["head_dim"]) == (gguf_files.HEADS, gguf_files.HEAD_DIM)
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, {"rope_type": "linear", "factor": 4.0})


def test_yarn(tmp_path):
    metadata = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    original = {"llama.rope.scaling.original_context_length": 48}
    for extra, expected in (({}, 32), (original, 48)):
        source = GgufFile(write(tmp_path / "model.gguf", hf_tensors(), metadata={**metadata, **extra}))
        assert source.config["rope_scaling"] == {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": expected,
        }


def _llama_cpp_rope_factors(theta, dim, factor, low, high, context):
    """The loop of `generate_extra_tensors` in llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (index / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("theta", "factor", "low", "high", "context"),
    [(500000.0, 8.0, 1.0, 4.0, 8192), (500000.0, 32.0, 1.0, 4.0, 8192), (10000.0, 4.0, 2.0, 64.0, 4000)],
)
def test_llama3_rope_is_recovered_from_its_divisors(tmp_path, theta, factor, low, high, context):
    dim = 128
    divisors = _llama_cpp_rope_factors(theta, dim, factor, low, high, context)
    metadata = {"llama.rope.freq_base": theta, "llama.rope.dimension_count": dim}
    raw = {"rope_freqs.weight": (divisors, Type.F32)}
    source = GgufFile(write(tmp_path / "model.gguf", hf_tensors(), metadata=metadata, raw=raw))
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert "rope_freqs.weight" not in source.names()
    found = _llama_cpp_rope_factors(
        theta,
        dim,
        scaling["factor"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(found, divisors, rtol=1e-3)
    if context == 8192:
        assert (scaling["low_freq_factor"], scaling["high_freq_factor"]) == (low, high)
        assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (factor, context)


def test_other_divisors_are_refused(tmp_path):
    raw = {"rope_freqs.weight": (np.linspace(1, 3, 8, dtype=np.float32), Type.F32)}
    with pytest.raises(CheckpointError, match="not Llama 3's scaling"):
        GgufFile(write(tmp_path / "model.gguf", hf_tensors(), raw=raw))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is missing or not positive"),
        ({"llama.attention.head_count_kv": 0}, "head_count_kv is missing or not positive"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0},
            "factor is missing or not positive",
        ),
        ({"llama.attention.head_count": [4, 4]}, "head_count is 2 values, not one int"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "'small', not one float"),
        ({"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}, "rotary or value dimensions"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    ],
)
def test_unsupported_or_missing_metadata(tmp_path, metadata, problem):
    with pytest.raises(CheckpointError, match=rf"model\.gguf.*{problem}"):
        GgufFile(write(tmp_path / "model.gguf", hf_tensors(), metadata=metadata))


def test_unsupported_architecture_is_named_with_the_supported(tmp_path):
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported.*llama"):
        GgufFile(write(tmp_path / "model.gguf", hf_tensors(), architecture="mamba"))


def test_unknown_tensors_keep_their_name(tmp_path):
    raw = {"blk.0.attn_sinks.weight": (np.ones(4, np.float32), Type.F32)}
    source = GgufFile(write(tmp_path / "model.gguf", hf_tensors(), raw=raw))
    assert "blk.0.attn_sinks.weight" in source.names()


def test_header_agrees_with_the_gguf_packages_reader(tmp_path):
    metadata = {**byte_vocabulary(["a b"]), "general.alignment": 64, "x.signed": np.array([-1, 2]).tolist()}
    path = write(tmp_path / "model.gguf", hf_tensors(), type=Type.Q8_0, metadata=metadata)
    header, reader = read_header(path, np.memmap(path, mode="r")), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert {name: (info.type, info.start, info.nbytes) for name, info in header.tensors.items()} == {
        tensor.name: (tensor.tensor_type, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    }
    for tensor in reader.tensors:
        assert header.tensors[tensor.name].shape == tuple(tensor.shape[::-1].tolist())


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    for content, problem in (
        (b"", "is empty"),
        (b"GGUF", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model\.gguf.*{problem}"):
            GgufFile(path)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 2**60, 0),
        struct.pack("<QQ", 0, 2**63),
        struct.pack("<QQQ", 0, 1, 2**62),
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**61),
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 2**61),
        struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1),
        struct.pack("<QQQ1sI", 0, 1, 1, b"k", 99),
        struct.pack("<QQQ1sI", 1, 0, 1, b"t", 2**31),
        struct.pack("<QQQ1sIQQIQ", 1, 0, 1, b"t", 2, 2**40, 2**40, 0, 0),
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 0, 2**62),
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 0, 0, 0),
        struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 999, 0),
    ],
)
def test_absurd_counts_and_offsets(tmp_path, body):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        GgufFile(path)


def test_overlapping_tensors(tmp_path):
    path = write(tmp_path / "model.gguf", hf_tensors())
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 16 + 4
    content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="overlap"):
        GgufFile(path)


def _read_everything(path):
    source = GgufFile(path)
    for name in source.names():
        source.tensor(name)
    source.tokenizer()


def _with_vocabulary(tmp_path):
    tensors = {name: values for name, values in hf_tensors().items() if ".1." not in name}
    return write(tmp_path / "model.gguf", tensors, type=Type.Q4_0, metadata=byte_vocabulary(["a b", "ab c"]))


def test_truncation_is_always_an_error(tmp_path):
    path = _with_vocabulary(tmp_path)
    content = path.read_bytes()
    _read_everything(path)
    # The end is padding; the last tensor's data end within 32 bytes of it.
    for length in sorted({*range(0, 200, 7), *np.linspace(0, len(content) - 32, 60, dtype=int).tolist()}):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            _read_everything(path)


def test_damaged_headers_raise_nothing_but_checkpoint_errors(tmp_path):
    path = _with_vocabulary(tmp_path)
    content = path.read_bytes()
    tokens = content.index(b"tokenizer.ggml.tokens")
    infos = content.index(b"token_embd.weight")
    regions = [range(tokens + 300), range(tokens, infos), range(infos - 8, infos + 900)]
    rng, refused = np.random.default_rng(0), 0
    for trial in range(900):
        damaged = bytearray(content)
        for at in rng.choice(regions[trial % 3], rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 255, rng.integers(256)])
        path.write_bytes(damaged)
        try:
            _read_everything(path)
        except CheckpointError:
            refused += 1
    assert refused > 300


def test_real_model(smollm2_gguf):
    source = GgufFile(smollm2_gguf)
    assert len(source.names()) == 272
    assert source.config["rope_theta"] == 100000.0
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.tensor("model.layers.29.mlp.down_proj.weight").shape == (576, 1536)
