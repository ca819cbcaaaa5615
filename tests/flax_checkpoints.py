"""The committed checkpoints of transformers 4's Flax models, and their trees as flax.serialization reads them."""

import shutil
from pathlib import Path

import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict

ORACLES = Path(__file__).parent / "oracles" / "flax"


def logits(name):
    """What transformers 4 computed, and the tokens."""
    with np.load(ORACLES / "logits.npz") as stored:
        return stored[name], stored["tokens"]


def tree(name):
    """The parameters of a checkpoint in one file, by flax itself."""
    return serialization.msgpack_restore((ORACLES / name / "flax_model.msgpack").read_bytes())


def flat(params):
    return flatten_dict(params, sep="/")


def write(directory, params, like="llama"):
    """A directory with the config of another, and these parameters as transformers wrote them."""
    directory.mkdir(exist_ok=True)
    shutil.copy(ORACLES / like / "config.json", directory)
    (directory / "flax_model.msgpack").write_bytes(serialization.to_bytes(params))
    return directory
