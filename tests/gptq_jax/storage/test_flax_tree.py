"""Checkpoints that real Flax models of transformers 4 wrote, against the logits those models gave."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax_checkpoints import ORACLES, flat, logits, tree, write
from safetensors.numpy import save_file

from gptq_jax import CheckpointError, load
from gptq_jax.inspection import inspect_model
from gptq_jax.storage.flax_names import torch_names
from gptq_jax.storage.flax_tree import FlaxTree
from gptq_jax.storage.load import open_source

CASES = sorted(path.parent.name for path in ORACLES.glob("*/config.json"))


def relative_error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_of_transformers_4(name):
    expected, tokens = logits(name.removesuffix("_base"))
    assert relative_error(load(ORACLES / name)(tokens), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_same_logits_from_torch_names(tmp_path, name):
    source = open_source(ORACLES / name)
    assert isinstance(source, FlaxTree)
    tensors = {each: np.ascontiguousarray(source.tensor(each)) for each in source.names()}
    assert {each: values.shape for each, values in tensors.items()} == {each: source.shape(each) for each in tensors}
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = logits("llama")[1]
    np.testing.assert_array_equal(load(tmp_path)(tokens), load(ORACLES / name)(tokens))


def test_layouts():
    """GPT-2's Conv1D is [d_out, d_in] in Flax, and [d_in, d_out] in torch; nn.Dense is the other way around."""
    for case, path, shape in (
        ("gpt2", "transformer/h/1/attn/c_attn", (16, 48)),
        ("gpt_neo", "transformer/h/1/mlp/c_fc", (64, 16)),
    ):
        stored = flat(tree(case))[f"{path}/kernel"]
        source = open_source(ORACLES / case)
        name = f"{path.replace('/', '.')}.weight"
        assert source.shape(name) == shape
        np.testing.assert_array_equal(source.tensor(name), stored.T)


@pytest.mark.parametrize("wrapping", ["params", "params of a train state", "base model", "base model in params"])
def test_trees_however_wrapped(tmp_path, wrapping):
    params = tree("llama")
    bare = {**params["model"], "lm_head": params["lm_head"]}
    wrapped = {
        "params": {"params": params},
        "params of a train state": {"step": 3, "params": {"params": params}, "opt_state": {"mu": params["model"]}},
        "base model": bare,
        "base model in params": {"params": bare},
    }[wrapping]
    if wrapping == "params of a train state":
        wrapped["step"] = np.int32(3)
    expected, tokens = logits("llama")
    assert relative_error(load(write(tmp_path / "m", wrapped))(tokens), expected) < 1e-5


def test_a_base_model_lacks_an_untied_head(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not fit its config: lm_head\.weight is missing"):
        load(write(tmp_path / "m", {"model": tree("llama")["model"]}))


def test_the_head_that_flax_llama_never_ties(tmp_path):
    directory = write(tmp_path / "m", tree("llama"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    expected, tokens = logits("llama")
    assert relative_error(load(directory)(tokens), expected) < 1e-5


def test_safetensors_have_precedence(tmp_path):
    shutil.copytree(ORACLES / "llama", tmp_path / "m")
    other = tree("llama")
    other["model"]["norm"]["weight"] = 2 * other["model"]["norm"]["weight"]
    names = torch_names(flat(other))
    save_file(
        {
            name: np.ascontiguousarray(flat(other)[found.path].T if found.transposed else flat(other)[found.path])
            for name, found in names.items()
        },
        tmp_path / "m" / "model.safetensors",
    )
    assert open_source(tmp_path / "m").format == "safetensors"
    np.testing.assert_array_equal(
        load(tmp_path / "m").params["head"]["norm"]["scale"], other["model"]["norm"]["weight"]
    )


@pytest.mark.parametrize(
    ("case", "format"), [("llama_sharded", "Flax msgpack"), ("llama_safetensors", "Flax safetensors")]
)
def test_inspect_says_the_format(case, format):
    found = inspect_model(str(ORACLES / case))
    assert found["kind"] == format
    assert len(found["layers"]) == 14


def test_memory_holds_one_array_more(tmp_path):
    import tracemalloc

    params = tree("llama")
    params["model"]["embed_tokens"]["embedding"] = np.ones((400_000, 16), np.float32)
    params["lm_head"]["kernel"] = np.ones((16, 400_000), np.float32)
    directory = write(tmp_path / "m", params)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 400_000}))
    del params
    one = 400_000 * 16 * 4
    load(ORACLES / "llama")  # compiles
    tracemalloc.start()
    load(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.6 * one  # numpy's arrays; JAX's, two of them, are not traced on the CPU


def test_bfloat16_stays(tmp_path):
    source = open_source(ORACLES / "llama_bfloat16")
    assert source.tensor("model.norm.weight").dtype == jnp.bfloat16
    assert load(ORACLES / "llama_bfloat16", dtype="bfloat16").params["head"]["norm"]["scale"].dtype == jnp.bfloat16


def test_a_file_with_its_config_elsewhere(tmp_path):
    path = tmp_path / "params.msgpack"
    path.write_bytes(serialization.to_bytes({"params": tree("llama")}))
    expected, tokens = logits("llama")
    for config in (ORACLES / "llama" / "config.json", ORACLES / "llama"):
        assert relative_error(load(path, arch_config=config)(tokens), expected) < 1e-5
    with pytest.raises(CheckpointError, match=r"params\.msgpack: does not say what model it is.*--arch-config"):
        load(path)
    with pytest.raises(CheckpointError, match=r"nowhere\.json: does not exist"):
        load(path, arch_config=tmp_path / "nowhere.json")


WRONG = {
    "int32": (
        {"norm": {"weight": np.ones(16, np.int32)}},
        r"msgpack: 'model/norm/weight' is int32, not a float weight",
    ),
    "float64": ({"norm": {"weight": np.ones(16)}}, "'model/norm/weight' is float64, not a float weight"),
    "nan": ({"norm": {"weight": np.full(16, np.nan, np.float32)}}, r"'model\.norm\.weight' holds NaN or infinity"),
    "shape": ({"norm": {"weight": np.ones(8, np.float32)}}, r"model\.norm\.weight has shape \(8,\), not \(16,\)"),
    "more": ({"extra": {"kernel": np.ones((2, 2), np.float32)}}, r"model\.extra\.weight belongs to no part"),
    "two names": (
        {"norm": {"weight": np.ones(16, np.float32), "scale": np.ones(16, np.float32)}},
        r"'model/norm/scale' and 'model/norm/weight' are both model\.norm\.weight|both model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_parameters_that_do_not_fit(tmp_path, name):
    change, problem = WRONG[name]
    params = tree("llama")
    with pytest.raises(CheckpointError, match=problem):
        load(write(tmp_path / "m", {**params, "model": {**params["model"], **change}}))


def test_shards(tmp_path):
    def fresh():
        return shutil.copytree(ORACLES / "llama_sharded", tmp_path / "m", dirs_exist_ok=True)

    second = fresh() / "flax_model-00002-of-00003.msgpack"
    second.unlink()
    with pytest.raises(CheckpointError, match=r"names shard 'flax_model-00002-of-00003\.msgpack', which is not there"):
        load(tmp_path / "m")
    shutil.copy(fresh() / "flax_model-00001-of-00003.msgpack", second)
    with pytest.raises(CheckpointError, match=r"is also in flax_model-00001-of-00003\.msgpack"):
        load(tmp_path / "m")
    index = fresh() / "flax_model.msgpack.index.json"
    content = json.loads(index.read_text())
    for file, problem in (("../x", "not a plain file name"), ("flax_model-00001-of-00003.msgpack", "lacks tensor")):
        content["weight_map"]["lm_head/kernel"] = file
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=problem):
            load(tmp_path / "m")


def test_all_leaves_are_float32():
    assert {leaf.dtype for leaf in jax.tree.leaves(load(ORACLES / "llama").params)} == {jnp.dtype("float32")}
