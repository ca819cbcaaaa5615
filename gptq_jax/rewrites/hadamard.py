"""A rotation of the residual stream, fused into the weights (R1 of QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

RMSNorm of a rotated vector is the rotated RMSNorm, once its gains are folded into the layers that read it. So the
stream x can be x Q throughout: what is added to it is written as W Q, and what reads it reads Q^T W. A Hadamard matrix
Q mixes all channels alike, and outliers of a few become small parts of all.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_jax.hooks.nnx import Params
from gptq_jax.methods.base import Rewrite
from gptq_jax.models.base import Model
from gptq_jax.models.fields import DecoderFields
from gptq_jax.rewrites.roles import changed, layer, readers, writers

# A norm's gain is this much more than what is stored.
_OFFSETS = {"rms": 0.0, "rms_plus_one": 1.0}
_JOINED = ("sequential", "parallel", "parallel_one_norm")


def hadamard(seed: int = 0) -> Rewrite:
    """Rotate the residual stream by a Hadamard matrix with random signs.

    The product runs as before, nothing is computed online. A head that is tied to the embedding becomes one of its own,
    because the gains of the last norm go into it. In bfloat16 the rotated weights are rounded: load in float32.

    Args:
        seed: of the signs.
    """
    return Rewrite(partial(_apply, seed=seed), name="hadamard", settings=(("rotation_seed", seed),))


def rotation(size: int, seed: int = 0) -> Float[np.ndarray, "size size"]:
    """An orthogonal matrix, float64: of Hadamard's if one of this size is known here, otherwise a random one."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size)
    found = hadamard_matrix(size)
    if found is None:
        return np.linalg.qr(rng.standard_normal((size, size)))[0]
    return signs[:, None] * found / size**0.5


def hadamard_matrix(size: int) -> Float[np.ndarray, "size size"] | None:
    """A matrix of ones and minus ones with orthogonal rows, by Sylvester's doubling and Paley's two constructions."""
    if size == 1:
        return np.ones((1, 1))
    if size % 2:
        return None
    half = hadamard_matrix(size // 2)
    if half is not None:
        return np.kron([[1.0, 1.0], [1.0, -1.0]], half)
    if size % 4 == 0 and _is_prime(size - 1):
        return np.eye(size) + _conference(size - 1, -1.0)
    if size % 4 == 0 and _is_prime(size // 2 - 1) and size % 8 == 4:
        core = _conference(size // 2 - 1, 1.0)
        return np.kron(core, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(size // 2), [[1.0, -1.0], [-1.0, -1.0]])
    return None


def _conference(prime: int, border: float) -> Float[np.ndarray, "_ _"]:
    """Quadratic residues of all differences mod a prime, with a border of ones; border -1 makes it skew."""
    squares = set(np.arange(1, prime) ** 2 % prime)
    character = np.array([0.0, *(1.0 if value in squares else -1.0 for value in range(1, prime))])
    each = np.arange(prime)
    matrix = np.ones((prime + 1, prime + 1))
    matrix[1:, 0] = border
    matrix[0, 0] = 0.0
    matrix[1:, 1:] = character[(each[:, None] - each[None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def check(model: Any) -> None:
    """Raise ValueError saying why a model's stream cannot be rotated."""
    if not isinstance(model, Model) or not isinstance(model.config, DecoderFields):
        raise ValueError("hadamard: the model is not a supplied decoder, so what reads its stream is not known.")
    config = model.config
    reasons = {
        f"its norm is {config.norm!r}, which takes away the mean over channels": config.norm not in _OFFSETS,
        f"its blocks are joined as {config.residual!r}, with norms on what is added": config.residual not in _JOINED,
        "its embedding is normalized, projected or has learned positions": (
            config.embedding_norm or config.embedding_size is not None or config.position_offset is not None
        ),
        "its stream is not normalized before the head": not config.final_norm,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"hadamard: the model's stream cannot be rotated, because {reason}.")


def _apply(model: Any, batches: Any, rules: Any, *, seed: int) -> Model:
    check(model)
    config = model.config
    turn = jnp.asarray(rotation(config.hidden_size, seed), jnp.float32)
    offset = _OFFSETS[config.norm]
    embedding = model.params["embed"]["embedding"]
    head = model.params["head"]
    kernel = embedding.T if config.tie_embeddings else head["lm_head"]["kernel"]
    lm_head = {**head.get("lm_head", {}), "kernel": _read(kernel, head["norm"]["scale"] + offset, turn)}
    layers = [
        _block(config.of_kind(config.layer_kind(index)), block, turn, offset)
        for index, block in enumerate(model.params["layers"])
    ]
    norm = {**head["norm"], "scale": jnp.full_like(head["norm"]["scale"], 1.0 - offset)}
    return replace(
        model,
        config=replace(config, tie_embeddings=False),
        params={
            "embed": {**model.params["embed"], "embedding": _write(embedding, turn)},
            "layers": layers,
            "head": {**head, "norm": norm, "lm_head": lm_head},
        },
        source={**model.source, "tie_word_embeddings": False},
    )


def _block(config: DecoderFields, block: Params, turn: Float[Array, "d d"], offset: float) -> Params:
    names = config.names
    for norm, roles in readers(config).items():
        path = getattr(names, norm)
        gain = layer(block, path)["scale"] + offset
        for role in roles:
            block = changed(block, getattr(names, role), "kernel", partial(_read, gain=gain, turn=turn))
        block = changed(block, path, "scale", lambda scale: jnp.full_like(scale, 1.0 - offset))
    for role in writers(config):
        for leaf in ("kernel", "bias"):
            block = changed(block, getattr(names, role), leaf, lambda array: _write(array, turn))
    return block


def _read(
    kernel: Float[Array, "*experts d d_out"], gain: Float[Array, "d"], turn: Float[Array, "d d"]
) -> Float[Array, "*experts d d_out"]:
    """The kernel of a layer that is fed the rotated stream, normalized without gains."""
    gained = kernel.astype(jnp.float32) * jnp.expand_dims(gain.astype(jnp.float32)[:, None], range(kernel.ndim - 2))
    return jnp.einsum("ji,...jo->...io", turn, gained, precision="highest").astype(kernel.dtype)


def _write(array: Float[Array, "*rows d"], turn: Float[Array, "d d"]) -> Float[Array, "*rows d"]:
    """What is added to the rotated stream."""
    return jnp.matmul(array.astype(jnp.float32), turn, precision="highest").astype(array.dtype)
