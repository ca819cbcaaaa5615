"""Rotations of what layers read, fused into the weights (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

RMSNorm of a rotated vector is the rotated RMSNorm, once its gains are folded into the layers that read it. So the
stream x can be x Q throughout: what is added to it is written as W Q, and what reads it reads Q^T W. A Hadamard matrix
Q mixes all channels alike, and outliers of a few become small parts of all.

Attention adds up values, each times a number: values of a head can be rotated where they are made, and taken back by
the layer after attention (R2 of SpinQuant, Liu et al. 2024, arXiv 2405.16406, which names the rotations). Between the
activation of an MLP and the layer `down` nothing can take up a rotation, which is therefore computed
as the model runs (R4).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_jax.hooks.nnx import Params
from gptq_jax.methods.base import Rewrite
from gptq_jax.models.base import Model
from gptq_jax.models.families.base import ROTATED_DOWN
from gptq_jax.models.fields import DecoderFields
from gptq_jax.models.hadamard import hadamard_matrix, hadamard_transform
from gptq_jax.rewrites.roles import changed, layer, readers, value_heads, writers

ROTATED_VALUES = "rotated_values"
# A norm's gain is this much more than what is stored.
_OFFSETS = {"rms": 0.0, "rms_plus_one": 1.0}
_JOINED = ("sequential", "parallel", "parallel_one_norm")


def hadamard(seed: int = 0, *, values: bool = False, online: bool = False) -> Rewrite:
    """Rotate the residual stream by a Hadamard matrix with random signs (R1), and more if asked.

    Without `online` the product runs as before, and nothing is computed online. A head that is tied to the embedding
    becomes one of its own, because the gains of the last norm go into it. In bfloat16 the rotated weights are rounded:
    load in float32.

    Args:
        seed: of the signs.
        values: also the values of every head, by one matrix, with random signs too (R2).
        online: also the input of every MLP's last layer, each time the model runs, by a Hadamard matrix that is a
            product of small ones (R4): the model's config has `rotated_down`, and other tools cannot run it.
    """
    more = {ROTATED_VALUES: values, ROTATED_DOWN: online}
    settings = (("rotation_seed", seed), *((name, True) for name, chosen in more.items() if chosen))
    return Rewrite(partial(_apply, seed=seed, values=values, online=online), name="hadamard", settings=settings)


def recorded(settings: Mapping[str, Any]) -> Rewrite | None:
    """The rotation that the settings of a report tell of; None if they tell of none."""
    if settings.get("rewrite") != "hadamard":
        return None
    values, online = (settings.get(name, False) for name in (ROTATED_VALUES, ROTATED_DOWN))
    return hadamard(settings["rotation_seed"], values=values, online=online)


def rotation(size: int, seed: int = 0) -> Float[np.ndarray, "size size"]:
    """An orthogonal matrix, float64: of Hadamard's if one of this size is known here, otherwise a random one."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size)
    found = hadamard_matrix(size)
    if found is None:
        return np.linalg.qr(rng.standard_normal((size, size)))[0]
    return signs[:, None] * found / size**0.5


def check(model: Any, *, online: bool = False) -> None:
    """Raise ValueError saying why a model's stream, or with `online` the input of `down`, cannot be rotated."""
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
    if online and config.rotated_down:
        raise ValueError("hadamard: online=True, but the input of `down` is rotated already: leave online out.")


def _apply(model: Any, batches: Any, rules: Any, *, seed: int, values: bool, online: bool) -> Model:
    check(model, online=online)
    config = model.config
    rotated = replace(config, tie_embeddings=False, rotated_down=config.rotated_down or online)  # or says why not
    turn = jnp.asarray(rotation(config.hidden_size, seed), jnp.float32)
    offset = _OFFSETS[config.norm]
    embedding = model.params["embed"]["embedding"]
    head = model.params["head"]
    kernel = embedding.T if config.tie_embeddings else head["lm_head"]["kernel"]
    lm_head = {**head.get("lm_head", {}), "kernel": _read(kernel, head["norm"]["scale"] + offset, turn)}
    layers = []
    for index, block in enumerate(model.params["layers"]):
        of_kind = config.of_kind(config.layer_kind(index))
        block = _block(of_kind, block, turn, offset)
        block = rotate_values(of_kind, block, seed) if values else block
        layers.append(changed(block, of_kind.names.down, "kernel", _read_online) if online else block)
    norm = {**head["norm"], "scale": jnp.full_like(head["norm"]["scale"], 1.0 - offset)}
    return replace(
        model,
        config=rotated,
        params={
            "embed": {**model.params["embed"], "embedding": _write(embedding, turn)},
            "layers": layers,
            "head": {**head, "norm": norm, "lm_head": lm_head},
        },
        source={**model.source, "tie_word_embeddings": False, **({ROTATED_DOWN: True} if online else {})},
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


def rotate_values(config: DecoderFields, block: Params, seed: int = 0) -> Params:
    """The block with the values of every head rotated, and an output layer that takes that back (R2)."""
    turn = jnp.asarray(rotation(config.head_dim, seed), jnp.float32)
    role, heads = value_heads(config)

    def write(array: Array) -> Array:
        by_head = array.reshape(*array.shape[:-1], -1, config.head_dim)
        return by_head.at[..., heads, :].set(_write(by_head[..., heads, :], turn)).reshape(array.shape)

    def read(kernel: Array) -> Array:
        by_head = kernel.reshape(-1, config.head_dim, kernel.shape[-1])
        return _read(by_head, jnp.ones(config.head_dim), turn).reshape(kernel.shape)

    for leaf in ("kernel", "bias"):
        block = changed(block, getattr(config.names, role), leaf, write)
    return changed(block, config.names.output, "kernel", read)


def _read_online(kernel: Float[Array, "d d_out"]) -> Float[Array, "d d_out"]:
    """The kernel of a layer whose input is given to `hadamard_transform` first."""
    return hadamard_transform(kernel.astype(jnp.float32).T).T


def _read(
    kernel: Float[Array, "*experts d d_out"], gain: Float[Array, "d"], turn: Float[Array, "d d"]
) -> Float[Array, "*experts d d_out"]:
    """The kernel of a layer that is fed the rotated stream, normalized without gains."""
    gained = kernel.astype(jnp.float32) * jnp.expand_dims(gain.astype(jnp.float32)[:, None], range(kernel.ndim - 2))
    return jnp.einsum("ji,...jo->...io", turn, gained, precision="highest").astype(kernel.dtype)


def _write(array: Float[Array, "*rows d"], turn: Float[Array, "d d"]) -> Float[Array, "*rows d"]:
    """What is added to the rotated stream."""
    return jnp.matmul(array.astype(jnp.float32), turn, precision="highest").astype(array.dtype)
