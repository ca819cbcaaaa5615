"""GGUF files of every family, with the tensor names of the gguf package and the metadata llama.cpp writes."""

import architecture_cases as cases
import gguf
import gguf_files
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.export.gguf_metadata import llama_metadata
from gptq_jax.storage.gguf import GgufFile

# What a file cannot say, or says otherwise, than the case's config.
_WINDOWS = {"sliding_window_pattern": 3, "layer_types": None, "query_pre_attn_scalar": 16}
CASES = {
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {"attention.key_length": 16}),
    "gemma": ("gemma", {}, {"attention.key_length": 16}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16},
        {
            "attention.key_length": 16,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3",
        _WINDOWS,
        {
            "attention.key_length": 16,
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": 3,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
    "phi3": ("phi3", {}, {"attention.sliding_window": 6}),
    "phi3_long": ("phi3", {}, {"rope.dimension_count": 6, "rope.scaling.original_context_length": 16}),
}


def write(path, name):
    """The case as llama.cpp's converter would write it, by names that the gguf package gives."""
    family, _, others = CASES[name]
    oracle = cases.oracle(name)
    config = oracle["config"]
    writer = gguf.GGUFWriter(path, family)
    metadata = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **others,
    }
    for key, value in metadata.items():
        gguf_files._add(writer, f"{family}.{key}", value)
    for key in ("bos", "eos", "padding"):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", {"bos": 1, "eos": 2, "padding": 0}[key])
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor, values in cases.tensors(oracle["tensors"]).items():
        stored = values + 1 if family.startswith("gemma") and tensor.endswith("norm.weight") else values
        writer.add_tensor(names.get_name(tensor, try_suffixes=(".weight", ".bias")), stored, raw_dtype=Type.F32)
    for kind in ("long", "short"):
        if factors := config.get("rope_parameters", {}).get(f"{kind}_factor"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(factors, np.float32), raw_dtype=Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_the_checkpoint_does(tmp_path, name):
    oracle = cases.oracle(name)
    source = GgufFile(write(tmp_path / "model.gguf", name))
    expected = cases.tensors(oracle["tensors"])
    assert set(source.names()) == set(expected)
    for tensor, values in expected.items():
        np.testing.assert_allclose(source.tensor(tensor), values, rtol=0, atol=2e-7, err_msg=tensor)
    found = architecture_from_config(source.config)
    other = {key: value for key, value in {**oracle["config"], **CASES[name][1]}.items() if value is not None}
    wanted = architecture_from_config(other)
    if name == "phi3_long":  # float32 factors
        for length in (8, 100):
            np.testing.assert_allclose(found.rope.frequencies(8, length)[0], wanted.rope.frequencies(8, length)[0])
        assert found.rope.frequencies(8, 8)[1] == wanted.rope.frequencies(8, 8)[1] > 1
    else:
        assert found == wanted


def test_the_largest_gemmas_scale_their_queries_otherwise(tmp_path):
    source = GgufFile(write(tmp_path / "model.gguf", "gemma2"))
    assert source.config["query_pre_attn_scalar"] == 16
    deep = gguf_files.write(
        tmp_path / "deep.gguf",
        {"model.embed_tokens.weight": np.ones((4, 64), np.float32)},
        metadata={
            **dict.fromkeys(gguf_files.METADATA),
            **{key.replace("llama.", "gemma2."): value for key, value in gguf_files.METADATA.items()},
            "gemma2.block_count": 46,
            "gemma2.attention.key_length": 16,
            "gemma2.attention.head_count": 8,
            "gemma2.attention.sliding_window": 6,
        },
        architecture="gemma2",
    )
    assert GgufFile(deep).config["query_pre_attn_scalar"] == 64 // 8


def test_a_window_is_asked_for_where_a_family_has_one(tmp_path):
    metadata = {key.replace("llama.", "gemma3."): value for key, value in gguf_files.METADATA.items()}
    tensors = {"model.embed_tokens.weight": np.ones((4, 64), np.float32)}
    path = gguf_files.write(tmp_path / "model.gguf", tensors, metadata=metadata, architecture="gemma3")
    with pytest.raises(CheckpointError, match=r"gemma3\.attention\.sliding_window is missing"):
        GgufFile(path)


@pytest.mark.parametrize("name", sorted(set(cases.CONFIGS) - {cases.DOCUMENTED}))
def test_what_is_written_to_files_is_llama_only(name):
    with pytest.raises(ValueError, match=r"has no counterpart in (GGUF|a GGUF file)"):
        llama_metadata(architecture_from_config(cases.oracle(name)["config"]))
