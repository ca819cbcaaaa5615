"""Damaged directories load and validate, or are refused by the library's own error naming a file; nothing else.

Bytes are changed anywhere in headers, index and configs, and values anywhere in their JSON. 10,000 directories in
all, most of them in the slow suite.
"""

import json
import random

import numpy as np
import pytest
from damaged import accepts, edit, perhaps_cut
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_checkpoints import MODULES, make
from safetensors.numpy import save

INDEX = "model.safetensors.index.json"


def files_of(form, *, sharded):
    """A small checkpoint as file name -> bytes; with its own config file where it is sharded."""
    modules = {name: shape for name, shape in MODULES.items() if "layers.0" in name}
    tensors, config, _ = make(form, 4, 16, form == "gptq", modules=modules)
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items() if "layers.1" not in name}
    config["num_hidden_layers"] = 1
    if not sharded:
        return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)}
    own = config.pop("quantization_config")
    own["dynamic"] = {"-:lm_head": {}, "+:.*mlp": {"bits": 4}}
    parts = {"a.safetensors": sorted(tensors)[:12], "b.safetensors": sorted(tensors)[12:]}
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    return {
        "config.json": json.dumps(config).encode(),
        "quantize_config.json": json.dumps(own).encode(),
        INDEX: json.dumps(index).encode(),
        **{file: save({name: tensors[name] for name in names}) for file, names in parts.items()},
    }


CHECKPOINTS = {
    "gptq": files_of("gptq", sharded=False),
    "gptq_v2 in shards": files_of("gptq_v2", sharded=True),
    "compressed-tensors": files_of("compressed-tensors", sharded=False),
    "awq": files_of("awq", sharded=False),
}


def json_part(name, content):
    """Where the JSON of a file begins and ends: all of it, or the header of a safetensors file."""
    if not name.endswith(".safetensors"):
        return 0, len(content)
    return 8, 8 + int.from_bytes(content[:8], "little")


def mutate_bytes(rng, name, content):
    """Some bytes of the header or the text replaced, inserted, removed, repeated, or the file cut off."""
    _, end = json_part(name, content)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind < 5:
            edit(rng, data, at, kind)
        elif digits := [i for i in range(end) if 48 <= data[i] <= 57]:
            data[rng.choice(digits)] = rng.choice(b"0123456789-.e")
        end = min(end, len(data))
        if not end:
            break
    return perhaps_cut(rng, data)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from((2**31, -(2**63), 2**64, 10**30, 1e400, -1e308, float("nan"), 0.5)),
    st.sampled_from(
        ("", "..", "/etc/passwd", "../a.safetensors", "a.safetensors", "gptq", "awq", "I32", "F16", "BF16", "re:(")
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


def paths_of(tree, prefix=()):
    """Every place in a JSON tree."""
    found = [prefix] if prefix else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        found += paths_of(child, (*prefix, key))
    return found


@st.composite
def changed_json(draw):
    """A checkpoint in which values of one file's JSON are replaced, removed, renamed or moved."""
    files = dict(CHECKPOINTS[draw(st.sampled_from(sorted(CHECKPOINTS)))])
    name = draw(st.sampled_from(sorted(files)))
    start, end = json_part(name, files[name])
    tree = json.loads(files[name][start:end])
    for _ in range(draw(st.integers(1, 3))):
        places = paths_of(tree)
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        at = tree
        for parent in parents:
            at = at[parent]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "rename", "copy")))
        if kind == "replace":
            at[key] = draw(VALUES)
        elif kind == "remove":
            del at[key]
        elif kind == "rename" and isinstance(at, dict):
            at[draw(st.text(max_size=8))] = at.pop(key)
        else:
            other = draw(st.sampled_from(places))
            source = tree
            for step in other:
                try:
                    source = source[step]
                except (KeyError, IndexError, TypeError):
                    break
            else:
                at[key] = json.loads(json.dumps(source))
    text = json.dumps(tree).encode()
    if name.endswith(".safetensors"):
        files[name] = len(text).to_bytes(8, "little") + text + files[name][end:]
    else:
        files[name] = text
    return files


def fuzz_bytes(directory, seeds):
    accepted = 0
    for seed in seeds:
        rng = random.Random(seed)
        files = dict(rng.choice(list(CHECKPOINTS.values())))
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, name, files[name])
        try:
            accepted += accepts(directory, files)
        except BaseException as error:
            error.add_note(f"seed {seed}, {name}")
            raise
    return accepted


def fuzz_json(directory, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed_json())
    def every(files):
        accepts(directory, files)

    every()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_undamaged(tmp_path, name):
    assert accepts(tmp_path, CHECKPOINTS[name])


def test_bytes(tmp_path):
    accepted = fuzz_bytes(tmp_path, range(400))
    assert 4 < accepted < 200  # some changes are harmless, most are seen


def test_values(tmp_path):
    fuzz_json(tmp_path, 300)


@pytest.mark.slow
def test_many_bytes(tmp_path):
    fuzz_bytes(tmp_path, range(400, 5400))


@pytest.mark.slow
def test_many_values(tmp_path):
    fuzz_json(tmp_path, 5000)
