"""Reading a packed checkpoint takes little more than the packed arrays themselves."""

import json
import subprocess
import sys

import numpy as np
import pytest
from packed_checkpoints import quantization_config
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, GROUP = 1024, 4096, 12, 128
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SHAPES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
SHAPES |= {"mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER), "mlp.down_proj": (INNER, HIDDEN)}
MIB = 2**20

CHILD = """
import resource, sys, threading, time
import jax
import gptq_jax
from gptq_jax.storage.store import tree_bytes

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

jax.block_until_ready(jax.device_put(1))
gptq_jax.load(sys.argv[2])
before = peak = resident()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = gptq_jax.load(sys.argv[1])
done = True
thread.join()
print(tree_bytes(model.params), peak - before, peak)
"""


def arrays(form, rng, d_in, d_out):
    def words(*shape):
        return rng.integers(-(2**31), 2**31, shape, np.int64).astype(np.int32)

    scales = np.full((d_in // GROUP, d_out), 0.01, np.float16)
    if form == "awq":
        return {"qweight": words(d_in, d_out // 8), "qzeros": words(d_in // GROUP, d_out // 8), "scales": scales}
    if form == "compressed-tensors":
        zeros = {"weight_zero_point": words(d_out // 8, d_in // GROUP), "weight_shape": np.array([d_out, d_in])}
        return {"weight_packed": words(d_out, d_in // 8), "weight_scale": scales.T.copy(), **zeros}
    return {
        "qweight": words(d_in // 8, d_out),
        "qzeros": words(d_in // GROUP, d_out // 8),
        "scales": scales,
        "g_idx": (np.arange(d_in) // GROUP).astype(np.int32),
    }


def write(directory, form, layers):
    """One shard for each layer; the size of all codes is 8 MiB for each."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    weight_map = {}

    def shard(file, tensors):
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))

    shard(
        "outer.safetensors",
        {
            "model.embed_tokens.weight": np.zeros((2048, HIDDEN), np.float16),
            "model.norm.weight": np.ones(HIDDEN, np.float16),
        },
    )
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}{name}.weight": np.ones(HIDDEN, np.float16)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        for module, (d_in, d_out) in SHAPES.items():
            parts = arrays(form, rng, d_in, d_out)
            tensors |= {f"{prefix}{module}.{suffix}": values for suffix, values in parts.items()}
        shard(f"layer-{layer}.safetensors", tensors)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    packing = quantization_config(form, 4, GROUP, False)
    config = {**CONFIG, "num_hidden_layers": layers, "quantization_config": packing}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors", "awq"])
def test_peak_while_loading(tmp_path, form):
    """What loading adds is held tighter than the promise, so that a copy of the model, or mapped files, would show."""
    model, small = write(tmp_path / "model", form, LAYERS), write(tmp_path / "small", form, 1)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(small)], capture_output=True, text=True, check=True, timeout=300
    )
    packed, grown, peak = map(int, done.stdout.split()[-3:])
    largest = max(d_in * d_out // 2 for d_in, d_out in SHAPES.values())
    assert packed > 96 * MIB
    assert grown < packed + largest + 48 * MIB, f"{grown / MIB:.0f} MiB for {packed / MIB:.0f} MiB"
    assert peak < packed + largest + 300 * 10**6
