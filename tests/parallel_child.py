"""Evaluates on several CPU devices, which a process must ask for before JAX starts: MODEL TEXT -> JSON on stdout."""

import json
import os
import sys
from dataclasses import replace

DEVICES, LENGTH, LAST = 4, 20, 997  # 49 windows, and a remainder

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import decoder_cases  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from decoder_models import build  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from tiny_quantization import BATCHES, compilations  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from gptq_jax import QuantSpec, ShardingRules, compare, perplexity, prepare, quantize, rtn  # noqa: E402
from gptq_jax.cli import app  # noqa: E402
from gptq_jax.evaluate import data_parallel  # noqa: E402
from gptq_jax.parallel import AXIS, choose_devices, make_mesh  # noqa: E402

CASES = [("jit", 3, 2), ("pmap", 3, 2)]  # parallel, devices, windows on each: the last batch has one window for six


def results(model: str, text: str) -> dict:
    """What was computed, by name."""
    floats = build({**decoder_cases.CASES["untied_mha"], "num_hidden_layers": 1})
    packed = prepare(quantize(floats, BATCHES, QuantSpec(group_size=20, symmetric=False), rtn())[0])
    tokens = np.random.default_rng(5).integers(0, 96, LAST).astype(np.int32)

    def both(parallel: str, devices: int | None, batch_size: int) -> list[float]:
        settings = {"length": LENGTH, "parallel": parallel, "devices": devices, "batch_size": batch_size}
        alone = perplexity(packed, tokens, **settings)
        found = compare(packed, floats, tokens, **settings)
        return [alone, found.perplexity, found.other_perplexity, found.kl, found.top1_agreement]

    out: dict = {"one": both("jit", 1, 2), "many": {f"{case}": both(*case) for case in CASES}}
    out["few windows"] = perplexity(packed, tokens, length=LENGTH, batch_size=30)  # 13 for each of 4 devices
    for parallel in ("jit", "pmap"):  # nothing is compiled again, nor copied between devices
        with compilations() as compiled, jax.transfer_guard_device_to_device("disallow"):
            perplexity(packed, tokens, length=LENGTH, parallel=parallel, devices=3, batch_size=2)
        out[f"compiled again by {parallel}"] = compiled

    rules = ShardingRules(make_mesh(choose_devices(4)), ((r"kernel$", PartitionSpec(None, AXIS)),))
    cut = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(
            leaf, rules(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape)
        ),
        floats.params,
    )
    out["cut"] = perplexity(replace(floats, params=cut), tokens, length=LENGTH, batch_size=2)
    out["cut stays"] = data_parallel("jit", None, cut).mesh is None

    command = ["eval", model, "--text", text, "--length", "8", "--json", "--devices"]
    for options in (["1"], ["4", "--parallel", "pmap"], ["5"]):
        done = CliRunner().invoke(app, [*command, *options])
        out[" ".join(["eval", *options])] = done.stdout if done.exit_code == 0 else done.stderr
    return out


if __name__ == "__main__":
    print(json.dumps(results(*sys.argv[1:])))
