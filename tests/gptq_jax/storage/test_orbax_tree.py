"""Orbax checkpoints of parameters, in every layout that Orbax and Flax write, with a config supplied."""

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from decoder_models import byte_tokenizer
from flax_checkpoints import ORACLES, logits, tree

from gptq_jax import CheckpointError, QuantSpec, load, save
from gptq_jax.inspection import inspect_model
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.storage.load import open_source
from gptq_jax.storage.parts import unpacked

# What Orbax had begun to read when a damaged file stopped it ends late.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = ORACLES / "llama" / "config.json"


@pytest.fixture(scope="module")
def own():
    return load(ORACLES / "llama").params


def write(path, params, **options):
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, params)
    return path


def manager(path, params, *, item="default", prefix=None):
    """Two steps of a CheckpointManager; the first holds zeros."""
    zeros = jax.tree.map(np.zeros_like, params)
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(step_prefix=prefix)) as steps:
        for step, values in ((90, zeros), (100, params)):
            args = ocp.args.StandardSave(values)
            steps.save(step, args=args if item == "default" else ocp.args.Composite(**{item: args}))
        steps.wait_until_finished()
    return path


def standard(path, params):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
    return path


def nnx_values(params):
    """As older Flax NNX states are saved."""
    return jax.tree.map(lambda leaf: {"value": leaf}, params)


LAYOUTS = {
    "PyTreeCheckpointer": write,
    "an array a folder": lambda path, params: write(path, params, use_ocdbt=False),
    "StandardCheckpointer": standard,
    "CheckpointManager": manager,
    "steps with a prefix": lambda path, params: manager(path, params, prefix="checkpoint"),
    "a named item": lambda path, params: manager(path, params, item="state"),
}
NESTINGS = {
    "bare": lambda params: params,
    "params": lambda params: {"params": params},
    "train state": lambda params: {"params": {"params": params}, "opt_state": {"mu": params}, "step": 7},
    "NNX state": nnx_values,
}


def check(path):
    expected, tokens = logits("llama")
    np.testing.assert_allclose(load(path, arch_config=CONFIG)(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, own):
    check(LAYOUTS[layout](tmp_path / "m", own))


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("names", ["own", "transformers"])
def test_trees(tmp_path, names, nesting, own):
    check(write(tmp_path / "m", NESTINGS[nesting](own if names == "own" else tree("llama"))))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_trees_of_other_families(tmp_path, family):
    """GPT-2's kernels are stored the other way around."""
    config = ORACLES / family / "config.json"
    write(tmp_path / "own", load(ORACLES / family).params)
    write(tmp_path / "transformers", tree(family))
    expected, tokens = logits(family)
    for names in ("own", "transformers"):
        found = load(tmp_path / names, arch_config=config)(tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_bfloat16(tmp_path, own):
    write(tmp_path / "m", jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), own))
    for dtype in ("bfloat16", "float32"):
        params = load(tmp_path / "m", arch_config=CONFIG, dtype=dtype).params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_a_part_of_a_store_is_no_model(tmp_path):
    save(load(ORACLES / "llama"), tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"arrays: is part of a directory that .* wrote: load .*store\.$"):
        load(tmp_path / "store" / "arrays", arch_config=CONFIG)


def test_the_tokenizer_lies_beside_the_config(tmp_path, own):
    write(tmp_path / "m", own)
    shutil.copy(CONFIG, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path / "m", arch_config=tmp_path / "config.json")
    assert model.tokenizer("the fox")["input_ids"] == byte_tokenizer()("the fox")["input_ids"]
    assert load(tmp_path / "m", arch_config=CONFIG).tokenizer is None


def test_inspect(tmp_path, own):
    found = inspect_model(str(write(tmp_path / "m", own)), CONFIG)
    assert found["kind"] == "Orbax"
    assert len(found["layers"]) == 14


def test_one_tensor_of_a_source(tmp_path):
    source = open_source(write(tmp_path / "m", tree("llama")), CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = tree("llama")["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    assert source.shape(name) == stored.T.shape
    np.testing.assert_array_equal(source.tensor(name), stored.T)


def changed(params, change):
    """The tree with the MLP of its last block changed."""
    *others, last = params["layers"]
    return {**params, "layers": [*others, {**last, "mlp": change(dict(last["mlp"]))}]}


def without(mlp):
    del mlp["up_proj"]
    return mlp


WRONG = {
    "missing": (without, r"layers\.1\.mlp\.up_proj\.kernel is missing"),
    "shape": (
        lambda mlp: {**mlp, "up_proj": {"kernel": np.ones((16, 25), np.float32)}},
        r"layers\.1\.mlp\.up_proj\.kernel has shape \(16, 25\), not \(16, 24\)",
    ),
    "more": (
        lambda mlp: {**mlp, "gate_proj": {**mlp["gate_proj"], "bias": np.ones(24, np.float32)}},
        r"layers\.1\.mlp\.gate_proj\.bias belongs to no part of this architecture",
    ),
    "integers": (
        lambda mlp: {**mlp, "up_proj": {"kernel": np.ones((16, 24), np.int32)}},
        r"'layers/1/mlp/up_proj/kernel' is int32, not a float weight \(float32, float16, bfloat16\)",
    ),
    "NaN": (
        lambda mlp: {**mlp, "up_proj": {"kernel": np.full((16, 24), np.nan, np.float32)}},
        "'layers/1/mlp/up_proj/kernel' holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_parameters_that_do_not_fit(tmp_path, name, own):
    change, problem = WRONG[name]
    write(tmp_path / "m", changed(own, change))
    with pytest.raises(CheckpointError, match=problem):
        load(tmp_path / "m", arch_config=CONFIG)


def test_the_config_of_another_model(tmp_path, own):
    write(tmp_path / "m", own)
    config = {**json.loads(CONFIG.read_text()), "intermediate_size": 32}
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit .*other\.json \(is it of this model\?\): layers\.0\.mlp"):
        load(tmp_path / "m", arch_config=tmp_path / "other.json")


def test_packed_weights(tmp_path):
    model = load(ORACLES / "llama")
    params = jax.tree.map(lambda leaf: leaf, model.params)
    projection = params["layers"][0]["mlp"]["up_proj"]
    projection["kernel"] = round_to_nearest(projection["kernel"], QuantSpec(group_size=8))
    save(replace(model, params=params), tmp_path / "store")
    write(tmp_path / "packed", unpacked(params))
    with pytest.raises(CheckpointError, match="holds packed weights: load the directory that"):
        load(tmp_path / "packed", arch_config=CONFIG)
    with pytest.raises(CheckpointError, match=r"takes no arch_config \(--arch-config\)"):
        load(tmp_path / "store", arch_config=CONFIG)


def test_what_needs_a_config_and_what_takes_none(tmp_path, own):
    write(tmp_path / "m", own)
    with pytest.raises(CheckpointError, match=r"m: does not say what model it is: .*--arch-config"):
        load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="takes no arch_config"):
        load(ORACLES / "llama_safetensors", arch_config=CONFIG)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give an Orbax checkpoint"):
        load(tmp_path / "nowhere", arch_config=CONFIG)
    for content, problem in (("{", "is not valid JSON"), ('{"model_type": "x"}', "model_type 'x' is not supported")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"config\.json: {problem}"):
            load(tmp_path / "m", arch_config=tmp_path)


def test_several_items(tmp_path, own):
    for item in ("ema", "params"):
        write(tmp_path / item, own)
    with pytest.raises(CheckpointError, match="holds ema and params: give the path of the one"):
        load(tmp_path, arch_config=CONFIG)
    check(tmp_path / "params")


def files_of(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file() and "array_metadatas" not in file.parts]


def test_damage(tmp_path, own):
    """Any file of the checkpoint cut off or emptied: it loads with the same values, or is refused."""
    good = write(tmp_path / "good", own)
    refused = []
    for file in files_of(good):
        for kept in (0, file.stat().st_size // 2):
            bad = tmp_path / "bad"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            target = bad / file.relative_to(good)
            target.write_bytes(target.read_bytes()[:kept])
            try:
                params = load(bad, arch_config=CONFIG).params
            except CheckpointError as error:
                refused.append(str(error))
            else:
                jax.tree.map(np.testing.assert_array_equal, params, own)
    gc.collect()
    assert len(refused) >= 4
    assert all(message.startswith(f"{tmp_path / 'bad'}: ") for message in refused)


CHILD = """
import sys
import jax
import numpy as np
from jax.sharding import PartitionSpec as P
import gptq_jax

path, config = sys.argv[1:]
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
rules = gptq_jax.ShardingRules(mesh, ((r"(up|gate)_proj.kernel", P(None, "model")),))
model = gptq_jax.load(path, arch_config=config, sharding=rules)
kernel = model.params["layers"][0]["mlp"]["up_proj"]["kernel"]
assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 6)}, kernel.sharding
assert len(model.params["embed"]["embedding"].addressable_shards) == 4
"""


@pytest.mark.parametrize("names", ["own", "transformers"])
def test_onto_four_devices(tmp_path, names, own):
    write(tmp_path / "m", own if names == "own" else tree("llama"))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(CONFIG)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
