"""Tiny models of random packed weights for the tests of exports, with the weights they stand for."""

from dataclasses import replace
from typing import Any

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
from decoder_models import build, byte_tokenizer
from packed_checkpoints import columns, random_module

from gptq_jax.models.base import Model
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

CONFIG: dict[str, Any] = {
    **decoder_cases.CASES["untied_mha"],
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
TOKENS = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], (2, 16), dtype=np.int32)


def packed_tensor(
    d_in: int, d_out: int, spec: QuantSpec, *, seed: int = 0, ordered: bool = True
) -> tuple[QuantizedTensor, np.ndarray]:
    """A weight of random codes and zero points, 0 among them, and its float64 value."""
    codes, zeros, scales, group, weight = random_module(
        np.random.default_rng(seed), d_in, d_out, spec.bits, spec.group_size, spec.symmetric, ordered
    )
    tensor = QuantizedTensor(
        codes=jnp.asarray(columns(codes, spec.bits)),
        scales=jnp.asarray(scales, spec.scale_dtype or "float16"),
        zeros=None if spec.symmetric else jnp.asarray(zeros, jnp.uint8),
        group_of_row=None if ordered else jnp.asarray(group, jnp.int32),
        spec=spec,
        d_in=d_in,
    )
    return tensor, weight


def packed_model(
    spec: QuantSpec = QuantSpec(group_size=32),
    *,
    config: dict[str, Any] | None = None,
    others: dict[str, QuantSpec | None] | None = None,
    ordered: bool = True,
    tokenizer: bool = False,
) -> tuple[Model, dict[str, np.ndarray]]:
    """A model whose linear layers are packed, and their weights [d_in, d_out] in float64.

    Args:
        spec: of every layer that is not among `others`.
        config: fields over CONFIG.
        others: the end of a layer's path, like "mlp.up_proj" -> its spec, or None to leave it float. "lm_head" is
            left float unless it is named.
        ordered: False: rows in activation order.
        tokenizer: have one.
    """
    model = build({**CONFIG, **(config or {})}, tokenizer=byte_tokenizer() if tokenizer else None)
    weights: dict[str, np.ndarray] = {}
    others = {"lm_head": None, **(others or {})}

    def pack(path: tuple, leaf: jax.Array) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        layer, _, kind = name.rpartition(".")
        own = next((other for end, other in others.items() if layer.endswith(end)), spec)
        if kind != "kernel" or own is None:
            return leaf
        tensor, weights[layer] = packed_tensor(*leaf.shape, own, seed=len(weights), ordered=ordered)
        return tensor

    return replace(model, params=jax.tree_util.tree_map_with_path(pack, model.params)), weights


def packed_leaves(model: Model) -> dict[str, QuantizedTensor]:
    """The packed weights by path."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
        if isinstance(leaf, QuantizedTensor)
    }


def assert_same_bits(found: Model, expected: Model) -> None:
    """Every code, scale and zero point, and which group each row is in."""
    found_leaves, expected_leaves = packed_leaves(found), packed_leaves(expected)
    assert found_leaves.keys() == expected_leaves.keys()
    for path, tensor in expected_leaves.items():
        other = found_leaves[path]
        assert (other.spec.bits, other.spec.symmetric) == (tensor.spec.bits, tensor.spec.symmetric), path
        assert other.spec.group_rows(other.d_in) == tensor.spec.group_rows(tensor.d_in), path
        for name in ("codes", "scales", "zeros", "group_of_row"):
            one, two = getattr(other, name), getattr(tensor, name)
            assert (one is None) == (two is None), (path, name)
            if two is not None:
                assert one.dtype == two.dtype, (path, name)
                np.testing.assert_array_equal(np.asarray(one), np.asarray(two), err_msg=f"{path} {name}")
