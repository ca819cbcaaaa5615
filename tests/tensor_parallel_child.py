"""Loads and runs models cut over several CPU devices, which a process must ask for before JAX starts: FOLDER -> JSON.

FOLDER gets the models; the tests that read the JSON are in tests/gptq_jax/test_tensor_parallel.py.
"""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import expert_models
import jax
import jax.numpy as jnp
import numpy as np
from decoder_models import TEXT, floated
from export_models import packed_model, packed_tensor
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_quantization import compilations
from typer.testing import CliRunner

from gptq_jax import (
    QuantizedTensor,
    QuantSpec,
    compare,
    generate,
    load,
    lora,
    perplexity,
    prepare,
    save,
    save_lora,
    with_lora,
)
from gptq_jax.cli import app
from gptq_jax.generate import generate_tokens
from gptq_jax.models.tensor_parallel import heads_of
from gptq_jax.storage.export import export
from gptq_jax.storage.sharding import place_on_mesh

TOKENS = np.random.default_rng(0).integers(0, 320, (4, 16), dtype=np.int32)
STREAM = TOKENS.reshape(-1)
CASES = {  # format, bits, group size, symmetric, shape of the mesh
    "2 bits": ("store", 2, 16, False, (2, 2)),
    "3 bits": ("store", 3, 32, True, (4,)),  # attention's output cannot be cut by inputs
    "4 bits": ("store", 4, 16, False, (2,)),
    "8 bits": ("gptq_v2", 8, -1, False, (4,)),
    "float": ("float", 4, 16, True, (4,)),
}
GENERATED = ("4 bits", "float")


def mesh_of(*shape: int) -> Mesh:
    names = ("data", "model")[-len(shape) :]
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )


def difference(found, expected) -> float:
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def tiny(spec: QuantSpec):
    """A packed model; weights of more bits are not larger."""
    model, _ = packed_model(spec, config={"num_key_value_heads": 4, "intermediate_size": 128}, tokenizer=True)

    def smaller(leaf):
        return replace(leaf, scales=leaf.scales / 2 ** (spec.bits - 2)) if isinstance(leaf, QuantizedTensor) else leaf

    is_packed = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    return replace(model, params=jax.tree.map(smaller, model.params, is_leaf=is_packed))


def held(model) -> dict[str, list]:
    """Of each array: its shape, that of each device's part, and how many devices have a part of their own."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [
            list(leaf.shape),
            [list(shard.data.shape) for shard in leaf.addressable_shards],
            len({str(shard.index) for shard in leaf.addressable_shards}),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }


def tokens_of(model) -> list[int]:
    return list(generate_tokens(model, TOKENS[0], max_new_tokens=6, stop_tokens=()))


def run_case(folder: Path, name: str) -> dict:
    kind, bits, group_size, symmetric, shape = CASES[name]
    one = tiny(QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric))
    path = folder / name
    if kind == "store":
        save(one, path)
    else:
        export(one, path, format=kind, dtype="float32")
    one = floated(load(path))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        many = load(path, mesh=mesh_of(*shape))
    out = {"held": held(many), "warnings": [str(warning.message) for warning in found], "logits": []}
    if name in GENERATED:
        out["logits"].append(difference(many(TOKENS), one(TOKENS)))
    if kind != "float":
        many = prepare(many)
        out["logits"].append(difference(many(TOKENS), one(TOKENS)))
    if name in GENERATED:
        out["tokens"] = [tokens_of(many), tokens_of(one)]
        with compilations() as compiled:
            tokens_of(many)
        out["compiled again"] = compiled
        out["perplexity"] = [perplexity(many, STREAM, length=16), perplexity(one, STREAM, length=16, devices=1)]
    return out


def experts(folder: Path) -> float:
    model = expert_models.float_model("mixtral")
    tokens = expert_models.batches(1)[0]
    for layer in model.params["layers"]:
        layers = layer["block_sparse_moe"]["experts"]
        for name, own in layers.items():
            count, *shape = own["kernel"].shape
            parts = [packed_tensor(*shape, QuantSpec(group_size=8), seed=seed)[0] for seed in range(count)]
            layers[name] = {"kernel": jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)}
    save(model, folder / "experts")
    many = prepare(load(folder / "experts", mesh=mesh_of(2)))
    return difference(many(tokens), model(tokens))


def rotated(folder: Path) -> list[float]:
    """Inputs that are rotated as the model runs mix what lies on several devices."""
    config = {"num_key_value_heads": 4, "intermediate_size": 96, "rotated_down": True}
    model, _ = packed_model(QuantSpec(group_size=16), config=config)
    one = floated(model)
    found = []
    for name, each in {"rotated": model, "rotated float": one}.items():
        save(each, folder / name)
        many = load(folder / name, mesh=mesh_of(2))
        found.append(difference((prepare(many) if each is model else many)(TOKENS), one(TOKENS)))
    return found


def refused(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(folder: Path) -> dict[str, str]:
    mesh, path = mesh_of(4), folder / "3 bits"
    cut = load(folder / "4 bits", mesh=mesh)
    one = load(folder / "4 bits")
    down = lambda *spec: ((r"down_proj\.kernel", P(*spec)),)  # noqa: E731
    o_proj = ((r"o_proj\.kernel", P("model", None)),)
    ordered = packed_model(QuantSpec(group_size=32), ordered=False)[0]
    columns = packed_model(QuantSpec(bits=3, group_size=-1))[0]
    narrow = replace(one.config, hidden_size=60)
    calls = {
        "axis": lambda: load(path, mesh=mesh, rules=down("tensor")),
        "pairs": lambda: load(path, mesh=mesh, rules={"mlp": "model"}),
        "regex": lambda: load(path, mesh=mesh, rules=(("(", P()),)),
        "groups": lambda: load(path, mesh=mesh, rules=o_proj),
        "words": lambda: place_on_mesh(one.config, columns.params, mesh, o_proj),
        "two axes": lambda: load(path, mesh=mesh_of(2, 2), rules=down("data", "model")),
        "order": lambda: place_on_mesh(one.config, ordered.params, mesh, down("model", None)),
        "devices": lambda: place_on_mesh(narrow, narrow.abstract_params(), mesh_of(8), ((r"gate", P("model")),)),
        "no axis": lambda: load(path, mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))),
        "no mesh": lambda: load(path, rules=o_proj),
        "both": lambda: load(path, mesh=mesh, sharding=NamedSharding(mesh, P())),
        "evaluated on devices": lambda: perplexity(cut, STREAM, length=16, devices=2),
        "evaluated by pmap": lambda: perplexity(cut, STREAM, length=16, parallel="pmap"),
        "compared": lambda: compare(cut, one, STREAM, length=16),
        "saved": lambda: save(prepare(cut), folder / "no"),
    }
    return {name: refused(call) for name, call in calls.items()}


def fallbacks() -> dict:
    """What rules for all models do where they do not fit."""
    ordered = packed_model(QuantSpec(group_size=32), ordered=False)[0]
    odd = replace(ordered.config, vocab_size=321, hidden_size=66, num_heads=3, num_kv_heads=3, head_dim=22)
    placed = {
        "odd": place_on_mesh(odd, odd.abstract_params(), mesh_of(4)),
        "order": place_on_mesh(ordered.config, ordered.params, mesh_of(4)),
    }
    return {name: placement.notes for name, placement in placed.items()}


def commands(folder: Path) -> dict[str, str]:
    (folder / "text.txt").write_text(TEXT)
    path, one = str(folder / "4 bits"), floated(load(folder / "4 bits"))
    evaluated = ["eval", path, "--text", str(folder / "text.txt"), "--length", "16", "--json"]
    generated = ["generate", path, "--prompt", "the quick", "--max-new-tokens", "3"]
    cut = ["--tensor-parallel", "2"]
    out = {"perplexity": perplexity(one, TEXT, length=16, devices=1)}
    out["text"] = generate(one, "the quick", max_new_tokens=3)
    adapters = {path: replace(added, b=jnp.full_like(added.b, 0.05)) for path, added in lora(one, 2).items()}
    save_lora(adapters, one, folder / "adapter")
    out["adapted perplexity"] = perplexity(with_lora(one, adapters), TEXT, length=16, devices=1)
    for name, command in {
        "eval": [*evaluated, *cut],
        "adapted": [*evaluated, *cut, "--adapter", str(folder / "adapter")],
        "generate": [*generated, *cut],
        "and devices": [*evaluated, *cut, "--devices", "2"],
        "too many": [*generated, "--tensor-parallel", "9"],
    }.items():
        done = CliRunner().invoke(app, command)
        out[name] = done.stdout if done.exit_code == 0 else done.stderr
    return out


def results(folder: Path) -> dict:
    """What was computed, by name."""
    out = {name: run_case(folder, name) for name in CASES}
    cut = load(folder / "2 bits", mesh=mesh_of(2, 2))
    out["heads"] = str(heads_of(cut.params["layers"][0]).spec)
    explicit = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    placed = load(folder / "2 bits", mesh=explicit).params["embed"]["embedding"].sharding.mesh
    out["explicit axes"] = {axis_type.name for axis_type in placed.axis_types} == {"Auto"}
    parts = {"experts": experts, "rotated": rotated, "refusals": refusals, "cli": commands}
    return {**out, **{name: part(folder) for name, part in parts.items()}, "fallbacks": fallbacks()}


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps(results(Path(sys.argv[1]))))
