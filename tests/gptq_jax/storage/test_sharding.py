"""Arrays go straight to their devices; several CPU devices stand for accelerators."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from export_models import CONFIG, packed_model
from jax.sharding import Mesh, PartitionSpec

from gptq_jax import QuantSpec, ShardingRules, save
from gptq_jax.storage.export import export

CHILD = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import gptq_jax

path, tokens, expected = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3])
devices = np.array(jax.devices())
assert devices.size == 4
mesh = Mesh(devices, ("model",))
outputs = gptq_jax.ShardingRules(mesh, (
    (r"(q|k|v|gate|up)_proj[.]kernel", P(None, "model")),
    (r"embed", P("model", None)),
))
model = gptq_jax.load(path, sharding=outputs)
up, down = (model.params["layers"][0]["mlp"][name]["kernel"] for name in ("up_proj", "down_proj"))
for leaf in jax.tree.leaves(up):
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert shapes == {(leaf.shape[0], leaf.shape[1] // 4)}, shapes
    assert {shard.device for shard in leaf.addressable_shards} == set(devices)
assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(down))
assert model.params["embed"]["embedding"].addressable_shards[0].data.shape[0] * 4 == expected.shape[-1]
np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=2e-5)

try:
    gptq_jax.load(path, sharding=gptq_jax.ShardingRules(mesh, ((r"norm", P("model")), (r"scales", P("model")))))
except ValueError as error:
    assert "of shape (3, 64) cannot be cut by" in str(error), error
    assert "give it another rule before this one" in str(error)
else:
    assert "float" in path  # it has no scales

on_all = gptq_jax.load(path, sharding=NamedSharding(mesh, P()))
assert {len(leaf.addressable_shards) for leaf in jax.tree.leaves(on_all.params)} == {4}
on_last = gptq_jax.load(path, sharding=jax.sharding.SingleDeviceSharding(devices[-1]))
assert {device for leaf in jax.tree.leaves(on_last.params) for device in leaf.devices()} == {devices[-1]}
np.testing.assert_allclose(on_last(tokens), expected, rtol=0, atol=2e-5)

gptq_jax.save(model, sys.argv[4])  # arrays on several devices
again = gptq_jax.load(sys.argv[4])
for one, two in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
    np.testing.assert_array_equal(one, two)
"""


@pytest.mark.parametrize("kind", ["store", "gptq_v2", "float"])
def test_load_onto_four_devices(tmp_path, kind):
    model, _ = packed_model(QuantSpec(group_size=32, symmetric=False))
    if kind == "store":
        save(model, tmp_path / f"model-{kind}")
    else:
        export(model, tmp_path / f"model-{kind}", format=kind, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 16), dtype=np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "logits.npy", model(tokens))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    arguments = [tmp_path / name for name in (f"model-{kind}", "tokens.npy", "logits.npy", "saved")]
    result = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr


def test_rules():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    rules = ShardingRules(mesh, ((r"up_proj\.kernel", PartitionSpec(None, "model")), ("mlp", PartitionSpec("model"))))
    assert rules("layers.0.mlp.up_proj.kernel.codes", (8, 96)).spec == PartitionSpec(None, "model")
    assert rules("layers.0.mlp.up_proj.kernel.group_of_row", (64,)).spec == PartitionSpec(None)
    assert rules("layers.0.mlp.down_proj.kernel.scales", (3, 64)).spec == PartitionSpec("model")
    assert rules("head.norm.scale", (64,)).spec == PartitionSpec()


def test_rules_that_cannot_be():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        ShardingRules(mesh, (("(", PartitionSpec()),))


def test_orbax_alone_restores_the_arrays(tmp_path):
    """What docs/formats.md shows, in a process that never imports this library."""
    model, weights = packed_model(QuantSpec(bits=4, group_size=32, symmetric=False))
    save(model, tmp_path / "store")
    np.save(tmp_path / "weight.npy", weights["layers.0.mlp.down_proj"])
    child = """
import sys
import numpy as np
import orbax.checkpoint as ocp

tree = ocp.PyTreeCheckpointer().restore(sys.argv[1])
kernel = tree["mlp"]["down_proj"]["kernel"]
words = np.asarray(kernel["codes"])
codes = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15).reshape(-1, words.shape[1])
group = np.arange(len(codes)) // 32
zeros, scales = (np.asarray(kernel[name])[group] for name in ("zeros", "scales"))
weight = (codes - zeros.astype(np.int64)) * scales.astype(float)
np.testing.assert_array_equal(weight, np.load(sys.argv[2]))
assert not any(name.startswith(("gptq_jax", "pallas_kernels")) for name in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path / "store/arrays/layers.0"), str(tmp_path / "weight.npy")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
