import gc
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import byte_tokenizer
from safetensors.numpy import load_file, save_file
from tiny_quantization import float_model

import gptq_jax
from gptq_jax import CheckpointError, load, open_checkpoint
from gptq_jax.storage.parameters import _all_finite

ORACLES = Path(__file__).parents[2] / "oracles" / "flax"
TOKENS = np.arange(48, dtype=np.int32).reshape(2, 24)


@pytest.fixture
def checkpoint(tmp_path):
    """A float model as safetensors, with a tokenizer."""
    model = float_model(layers=2)
    gptq_jax.export(model, tmp_path / "float", format="float", dtype="float32")
    byte_tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert jax.tree.structure(one) == jax.tree.structure(two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_those_of_the_model_in_memory(checkpoint, dtype):
    source, model = open_checkpoint(checkpoint, dtype=dtype), load(checkpoint, dtype=dtype)
    assert (source.config, source.source) == (model.config, model.source)
    for name in ("embed", "head"):
        same(source.params[name], model.params[name])
    for block, params in zip(source.calibration([], []).blocks, model.params["layers"], strict=True):
        same(block.params, params)
    same(source.calibration([], []).assemble(list(source.params["layers"]), {}).params, model.params)


@pytest.mark.parametrize("kind", ["flax msgpack", "orbax"])
def test_other_formats(tmp_path, kind):
    import orbax.checkpoint as ocp

    config = ORACLES / "llama" / "config.json"
    model = load(ORACLES / "llama")
    if kind == "orbax":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "m", model.params)
        source = open_checkpoint(tmp_path / "m", arch_config=config)
    else:
        source = open_checkpoint(ORACLES / "llama")
    for index, params in enumerate(model.params["layers"]):
        same(source.read(f"layers.{index}"), params)


def test_the_stream_starts_as_that_of_the_model(checkpoint):
    source, model = open_checkpoint(checkpoint), load(checkpoint)
    (one,), (two,) = (list(each.calibration([TOKENS], [None]).start()) for each in (source, model))
    np.testing.assert_array_equal(one, two)


def test_nothing_is_kept(checkpoint):
    source = open_checkpoint(checkpoint)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    for block in source.calibration([TOKENS], [None]).blocks:
        assert jax.tree.leaves(block.params)
    source.identity()
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + TOKENS.nbytes


def test_identity_tells_what_differs(checkpoint):
    first = open_checkpoint(checkpoint).identity()
    assert open_checkpoint(checkpoint).identity() == first
    assert open_checkpoint(checkpoint, dtype="bfloat16").identity() == {**first, "dtype": "bfloat16"}

    def changed():
        now = open_checkpoint(checkpoint).identity()
        return {name for name in first if now[name] != first[name]}

    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: np.nextafter(tensors[name], 1.0)}, checkpoint / "model.safetensors")
    assert changed() == {"weights"}
    save_file(tensors, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert changed() == {"config"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    byte_tokenizer(280).save_pretrained(checkpoint)
    assert changed() == {"tokenizer"}


def test_what_does_not_fit_is_refused_at_once(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    broken = tensors[name].copy()
    broken[3, 5] = np.nan
    save_file({**tensors, name: broken}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinity"):
        open_checkpoint(checkpoint)
    save_file({key: value for key, value in tensors.items() if key != name}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(checkpoint)


def test_stores_and_packed_weights_are_refused(tmp_path):
    gptq_jax.save(float_model(layers=1), tmp_path / "store")
    with pytest.raises(CheckpointError, match="was written by save: load it"):
        open_checkpoint(tmp_path / "store")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_numbers_that_are_not_finite_are_seen(dtype, value):
    values = np.array([0.0, -1.0, 6e4, 1e-7], dtype)
    assert _all_finite(values)
    assert not _all_finite(np.append(values, np.asarray(value, dtype)))
