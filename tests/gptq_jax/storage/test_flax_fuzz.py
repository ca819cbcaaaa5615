"""Damaged Flax checkpoints load and are finite, or are refused by the library's own error naming a file."""

import random

import pytest
from damaged import accepts, edit, perhaps_cut
from flax import serialization
from flax_checkpoints import ORACLES, tree


def files(name):
    return {file.name: file.read_bytes() for file in (ORACLES / name).iterdir()}


def in_pieces():
    whole, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 1500
    try:
        return {**files("llama"), "flax_model.msgpack": serialization.to_bytes(tree("llama"))}
    finally:
        serialization.MAX_CHUNK_SIZE = whole


CHECKPOINTS = {name: files(name) for name in ("llama", "llama_sharded", "llama_bfloat16", "llama_safetensors")}
CHECKPOINTS["llama in pieces"] = in_pieces()


def structure(content):
    """Places of a msgpack file that are no values of arrays: names, shapes, dtypes and lengths."""
    text = [at for at in range(len(content)) if 32 <= content[at] < 127]
    return [at for letter in text for at in range(letter - 6, letter + 2) if 0 <= at < len(content)]


PLACES = {
    (name, file): structure(content)
    for name, found in CHECKPOINTS.items()
    for file, content in found.items()
    if file.endswith(".msgpack")
}


def mutated(rng, content, places):
    """Some bytes replaced, inserted, removed or repeated, mostly in the structure, or the file cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = min(rng.choice(places) if places and rng.random() < 0.9 else rng.randrange(len(data)), len(data) - 1)
        edit(rng, data, at, rng.randrange(5))
    return perhaps_cut(rng, data)


def fuzz(directory, seeds):
    accepted = 0
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(sorted(CHECKPOINTS))
        damaged = dict(CHECKPOINTS[name])
        file = rng.choice(sorted(damaged))
        damaged[file] = mutated(rng, damaged[file], PLACES.get((name, file)))
        try:
            accepted += accepts(directory, damaged)
        except BaseException as error:
            error.add_note(f"seed {seed}, {name}, {file}")
            raise
    return accepted


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_undamaged(tmp_path, name):
    assert accepts(tmp_path, CHECKPOINTS[name])


def test_bytes(tmp_path):
    accepted = fuzz(tmp_path, range(150))
    assert 4 < accepted < 100  # a changed value of an array is not seen


@pytest.mark.slow
def test_many_bytes(tmp_path):
    fuzz(tmp_path, range(150, 1650))
