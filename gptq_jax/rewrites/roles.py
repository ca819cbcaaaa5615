"""Who writes what the layers of a supplied decoder read, by role (a field of `Names`)."""

from collections.abc import Callable
from functools import reduce
from typing import Any

from jaxtyping import Array

from gptq_jax.hooks.nnx import Params
from gptq_jax.models.fields import DecoderFields
from gptq_jax.models.mlp import MLPS


def readers(config: DecoderFields) -> dict[str, tuple[str, ...]]:
    """The layers that read each norm, in blocks whose norms come before what they normalize for."""
    attention = ("query", "key", "value") if config.qkv == "separate" else ("qkv",)
    if config.experts is not None:
        mlp: tuple[str, ...] = ("router", "expert_gate", "expert_up")
    else:
        mlp = tuple(role for role in MLPS[config.mlp].layers(1, 1) if role != "down")
    if config.residual == "parallel_one_norm":
        return {"attention_norm": (*attention, *mlp)}
    return {"attention_norm": attention, "mlp_norm": mlp}


def value_heads(config: DecoderFields) -> tuple[str, slice]:
    """The layer that makes values, and which of its outputs they are, head by head."""
    layers = {
        "separate": ("value", slice(None)),
        "concatenated": ("qkv", slice(-config.num_kv_heads, None)),
        "per_head": ("qkv", slice(2, None, 3)),
    }
    return layers[config.qkv]


def writers(config: DecoderFields) -> tuple[str, ...]:
    """The layers whose outputs are added to the residual stream."""
    return ("output", "down" if config.experts is None else "expert_down")


def layer(params: Params, path: str) -> Params:
    """The parameters of the layer at a dotted path."""
    return reduce(lambda here, name: here[name], path.split("."), params)


def changed(params: Params, path: str, leaf: str, change: Callable[[Array], Any]) -> Params:
    """`params` with another value of a leaf, if there is one, of the layer at a dotted path; in the dtype it had."""
    name, _, rest = path.partition(".")
    if rest:
        return {**params, name: changed(params[name], rest, leaf, change)}
    own = params[name]
    if leaf not in own:
        return params
    return {**params, name: {**own, leaf: change(own[leaf]).astype(own[leaf].dtype)}}
