"""A user's own module, saved and loaded again."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import own_modules
import pytest
from flax import nnx
from tiny_quantization import float_model

import gptq_jax
from gptq_jax import CheckpointError, QuantSpec, adapt, rtn
from gptq_jax.inspection import inspect_model
from gptq_jax.report import without_times
from gptq_jax.storage.manifest import MANIFEST, manifest_digest

TOKENS = np.random.default_rng(0).integers(0, own_modules.VOCAB, (2, 8), dtype=np.int32)
APART = [("linen", False), ("nnx", True)]
CASES = [("linen", True), ("nnx", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in APART)]


@lru_cache
def packed(flavour, scan):
    if flavour == "linen":
        model = adapt(*own_modules.linen(scan=scan), blocks="layers")
    else:
        model = adapt(own_modules.in_nnx(scan=scan), blocks="layers")
    return gptq_jax.quantize(model, [TOKENS], QuantSpec(bits=3, group_size=16, symmetric=False), rtn())[0]


def module(flavour, scan, **options):
    return own_modules.LinenLM(scan=scan) if flavour == "linen" else own_modules.in_nnx(scan=scan, **options)


@pytest.mark.parametrize(("flavour", "scan"), CASES)
def test_round_trip(flavour, scan, tmp_path):
    model = packed(flavour, scan)
    gptq_jax.save(model, tmp_path / "out")
    loaded = gptq_jax.load(tmp_path / "out", module=module(flavour, scan))
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
    for one, other in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert loaded.layouts == model.layouts
    assert loaded.report == without_times(json.loads(json.dumps(model.report)))
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


def test_a_float_model_too(tmp_path):
    model = adapt(*own_modules.linen())
    gptq_jax.save(model, tmp_path / "out")
    np.testing.assert_array_equal(gptq_jax.load(tmp_path / "out", module=own_modules.LinenLM())(TOKENS), model(TOKENS))


def test_a_module_of_shapes_will_do(tmp_path):
    gptq_jax.save(packed("nnx", False), tmp_path / "out")
    abstract = nnx.eval_shape(lambda: own_modules.in_nnx(scan=False))
    loaded = gptq_jax.load(tmp_path / "out", module=abstract)
    np.testing.assert_array_equal(loaded(TOKENS), packed("nnx", False)(TOKENS))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.norm.mean[...] = jnp.arange(8.0)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


def test_state_beside_the_parameters_is_kept(tmp_path):
    model, x = adapt(Normalized(nnx.Rngs(0))), np.ones((2, 8), np.float32)
    gptq_jax.save(model, tmp_path / "out")
    loaded = gptq_jax.load(tmp_path / "out", module=nnx.eval_shape(lambda: Normalized(nnx.Rngs(0))))
    np.testing.assert_array_equal(loaded(x), model(x))


def test_plain_orbax_restores_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    model = packed("linen", True)
    gptq_jax.save(model, tmp_path / "out")
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "out" / "arrays" / "module")
    up = model.params["layers"]["up"]
    np.testing.assert_array_equal(arrays["params"]["layers"]["up"]["kernel"]["codes"], up["kernel"].codes)
    np.testing.assert_array_equal(arrays["params"]["layers"]["up"]["bias"], up["bias"])


def test_inspect(tmp_path):
    gptq_jax.save(packed("linen", True), tmp_path / "stacked")
    gptq_jax.save(packed("nnx", False), tmp_path / "apart")
    stacked, apart = (inspect_model(str(tmp_path / name)) for name in ("stacked", "apart"))
    stacked_shapes, shapes = (
        {layer["path"]: layer["shape"] for layer in found["layers"]} for found in (stacked, apart)
    )
    assert stacked_shapes["layers.down"] == [2, 64, 32]
    assert shapes["layers.0.down"] == [64, 32]
    assert (stacked["quantized_layers"], apart["quantized_layers"]) == (6, 10)
    assert apart["kept_float"]["embed.embedding"] == "it is looked up by index"


def test_modules_that_are_missing_or_others(tmp_path):
    gptq_jax.save(packed("nnx", False), tmp_path / "own")
    gptq_jax.save(float_model(layers=1), tmp_path / "supplied")
    with pytest.raises(CheckpointError, match=r"holds a module of your own: pass it, load\(path, module=\.\.\.\)"):
        gptq_jax.load(tmp_path / "own")
    with pytest.raises(CheckpointError, match="holds a supplied architecture: load it without module"):
        gptq_jax.load(tmp_path / "supplied", module=own_modules.LinenLM())
    with pytest.raises(
        CheckpointError, match=r"does not fit NnxLM: layers\.2\.attn\..* is None here, but \(.*\) there"
    ):
        gptq_jax.load(tmp_path / "own", module=module("nnx", False, layers=3))
    with pytest.raises(ValueError, match="was not written by save, so that module says nothing"):
        gptq_jax.load(tmp_path, module=own_modules.LinenLM())


def change(folder, entry, key, value):
    """Another value in config.json, all checksums of the store set right."""
    import hashlib

    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["gptq_jax_module"][entry][key] = value
    file.write_text(json.dumps(content))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"]["config.json"] = {"bytes": file.stat().st_size, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


@pytest.mark.parametrize(
    ("entry", "key", "value"),
    [
        ("layouts", "layers.0.up.kernel", {"shape": [32, 64]}),
        ("layouts", "layers.0.up.kernel", 3),
        ("leaves", "params.layers.0.up.kernel", [64, 32]),
        (
            "layouts",
            "layers.0.up.kernel",
            {"shape": [32, 63], "dtype": "float32", "stack": [], "inputs": [[[0], 32]], "outputs": [[[1], 64]]},
        ),
    ],
)
def test_damaged_layouts(entry, key, value, tmp_path):
    gptq_jax.save(packed("nnx", False), tmp_path / "out")
    change(tmp_path / "out", entry, key, value)
    with pytest.raises(CheckpointError, match="describes no model"):
        gptq_jax.load(tmp_path / "out", module=module("nnx", False))


CHILD = """
import sys
import jax, numpy as np, own_modules, gptq_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(jax.devices()), ("model",))
assert mesh.size == 4

def placement(name, shape):
    last = name.endswith((".codes", ".scales", ".zeros")) and shape[-1] % 4 == 0
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "model") if last else PartitionSpec())

model = gptq_jax.load(sys.argv[1], sharding=placement, module=own_modules.LinenLM(scan=True))
codes = model.params["layers"]["up"]["kernel"].codes
assert codes.addressable_shards[0].data.shape[-1] * 4 == codes.shape[-1]
np.save(sys.argv[3], jax.jit(lambda model, tokens: model(tokens))(model, np.load(sys.argv[2])))
"""


def test_it_runs_on_four_devices(tmp_path):
    model = packed("linen", True)
    gptq_jax.save(model, tmp_path / "out")
    np.save(tmp_path / "tokens.npy", TOKENS)
    tests = Path(own_modules.__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    arguments = [tmp_path / "out", tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), model(TOKENS), rtol=1e-3, atol=1e-4)
