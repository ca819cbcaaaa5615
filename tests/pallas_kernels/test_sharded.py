"""Weights cut over the devices of a mesh, against one float64 product; several CPU devices stand for accelerators."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.mosaic_gpu.compat import OLDEST_JAX

HERE = Path(__file__).resolve().parents[1]
CHILD = """
import json
import jax, jax.numpy as jnp, numpy as np
import packed_weights
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from kernel_cases import inputs, packed
from pallas_kernels import api, sharded, weight as weights
from pallas_kernels.mosaic_gpu.compat import OLDEST_JAX
from pallas_kernels.sharded import Cut, prepare

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
x = inputs(4, 3, 128)
out = {}


def far(found, expected):
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())



grids = {
    "2 bits": dict(bits=2, group_size=32, symmetric=False),
    "3 bits": dict(bits=3, group_size=64),
    "4 bits, one group": dict(bits=4, symmetric=False),
    "8 bits": dict(bits=8, group_size=16),
}
cuts = {
    "inputs": Cut(mesh=mesh, by="inputs", axes=("model",)),
    "inputs over all": Cut(mesh=mesh, by="inputs", axes=("data", "model")),
    "outputs": Cut(mesh=mesh, by="outputs", axes=("model",)),
    "nothing": Cut(mesh=mesh),
}
for grid, fields in grids.items():
    case = packed_weights.make(128, 24, **fields)
    for how, cut in cuts.items():
        if grid != "2 bits" and how in ("inputs over all", "nothing"):
            continue
        part = prepare([packed(case)], cut)
        assert (part.d_in, part.d_out) == (128, 24)
        (y,) = sharded.quantized_matmul(jnp.array(x), part)
        out[f"{grid} by {how}"] = far(y, x.astype(np.float64) @ case.weight)

# two weights as one
cases = [packed_weights.make(128, size, group_size=32) for size in (16, 8)]
together = prepare([packed(case) for case in cases], cuts["outputs"])
for case, y in zip(cases, sharded.quantized_matmul(jnp.array(x), together, sizes=(16, 8)), strict=True):
    out[f"fused, {y.shape[-1]}"] = far(y, x.astype(np.float64) @ case.weight)

# groups in another order than the inputs
ordered = packed_weights.make(128, 24, group_size=32, permuted=True)
(y,) = sharded.quantized_matmul(jnp.array(x), prepare([packed(ordered)], cuts["outputs"]))
out["order by outputs"] = far(y, x.astype(np.float64) @ ordered.weight)

# gradients in x, against the transposed product
case = packed_weights.make(128, 24, group_size=16)
for how in ("inputs", "outputs", "nothing"):
    part = prepare([packed(case)], cuts[how])
    dx = jax.grad(lambda x: sharded.quantized_matmul(x, part)[0].sum())(jnp.array(x))
    out[f"gradient by {how}"] = far(dx, np.broadcast_to(case.weight.sum(1), x.shape))

# experts, one of them without rows, and rows past the last
experts = [packed_weights.make(128, 16, group_size=32, seed=seed) for seed in range(4)]
stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(packed, experts))
sizes, rows = (3, 0, 4, 2), inputs(11, 128)
expected = np.zeros((11, 16))
for row, expert in enumerate(np.repeat(np.arange(4), sizes)):
    expected[row] = rows[row].astype(np.float64) @ experts[expert].weight
for by in ("experts", "inputs", "outputs"):
    part = prepare([stack], Cut(mesh=mesh, by=by, axes=("model",)))
    (y,) = sharded.grouped_matmul(jnp.array(rows), part, jnp.array(sizes))
    out[f"experts by {by}"] = far(y, expected)

part = prepare([packed(case)], cuts["outputs"])
(y,) = sharded.quantized_matmul(jnp.array(x), part)
out["shards"] = sorted({shard.data.shape for leaf in jax.tree.leaves(part) for shard in leaf.addressable_shards})
out["y"] = [str(y.sharding.spec), sorted({shard.data.shape for shard in y.addressable_shards})]
odd = sharded.quantized_matmul(jnp.array(x[:3]), part)[0]  # which two devices cannot share
out["odd batch"] = far(odd, x[:3].astype(np.float64) @ case.weight)
for name, call in {
    "x": lambda: sharded.quantized_matmul(jnp.ones((2, 64)), part),
    "cut": lambda: prepare([packed(packed_weights.make(96, 8, group_size=32))], cuts["inputs"]),
    "outputs": lambda: prepare([packed(packed_weights.make(64, 9))], cuts["outputs"]),
    "order": lambda: prepare([packed(ordered)], cuts["inputs"]),
}.items():
    try:
        call()
    except ValueError as error:
        out[name] = str(error)

if jax.__version_info__[:3] >= OLDEST_JAX:
    hopper = lambda: ("gpu", "9.0")
    api.target = weights.target = hopper
    case = packed_weights.make(1024, 256, group_size=128)
    x16 = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)

    def lowered(part, product):
        traced = jax.jit(product).trace(jax.ShapeDtypeStruct(x16.shape, x16.dtype, sharding=whole), part)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    whole = jax.sharding.NamedSharding(mesh, P())
    for how in ("inputs", "outputs", "nothing"):
        part = prepare([packed(case)], cuts[how], "mosaic_hopper", jnp.bfloat16)
        text = lowered(part, lambda x, part: sharded.quantized_matmul(x, part)[0])
        out[f"lowered by {how}"] = ["@mosaic_gpu" in text, part.problem.d_in, part.problem.d_out]
print(json.dumps(out))
"""
KINDS = ("inputs", "outputs", "nothing")


@pytest.fixture(scope="module")
def found():
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products(found):
    by_cut = {name: error for name, error in found.items() if " by " in name and not name.startswith("lowered")}
    assert len(by_cut) == 4 + 3 * 2 + 1 + 3 + 3
    others = {name: found[name] for name in ("fused, 16", "fused, 8", "odd batch")}
    assert {name: error for name, error in {**by_cut, **others}.items() if not error < 1e-5} == {}


def test_each_device_holds_its_outputs(found):
    assert found["shards"] == [[8, 12], [16, 12]]  # groups of scales, and words
    spec, shapes = found["y"]
    assert "'data'" in spec
    assert "'model'" in spec
    assert shapes == [[2, 3, 12]]


def test_refusals(found):
    assert "x has 64 inputs in its last axis, but the weight has d_in=128" in found["x"]
    assert "parts of 48 inputs would cut groups of 32" in found["cut"]
    assert "9 outputs cannot be cut into 2 equal parts" in found["outputs"]
    assert "in another order than their groups" in found["order"]


@pytest.mark.skipif(jax.__version_info__[:3] < OLDEST_JAX, reason="this jax has no kernels to lower")
def test_gpu_kernels_lower_to_the_parts(found):
    assert [found[f"lowered by {kind}"] for kind in KINDS] == [[True, 512, 256], [True, 1024, 128], [True, 1024, 256]]
