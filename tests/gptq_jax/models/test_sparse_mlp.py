"""Blocks with experts against numpy, an expert at a time; their logits are in test_architectures.py."""

import architecture_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import float_model, routed_by_hand
from flax import nnx

from gptq_jax.hooks.nnx import bind, float_layers, linear_layers, parameters
from gptq_jax.models.experts import Experts, by_experts, expert_layers
from gptq_jax.models.registry import architecture_from_config


class Sparse(nnx.Module):
    def __init__(self, experts):
        for role, layer in expert_layers(8, experts, rngs=nnx.Rngs(0)).items():
            setattr(self, role, layer)

    def __call__(self, x):
        return by_experts(lambda role: getattr(self, role), jax.nn.relu, x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_each_token_by_its_experts(normalize, rows):
    experts = Experts(count=5, top_k=2, intermediate_size=12, normalize=normalize)
    abstract = nnx.eval_shape(lambda: Sparse(experts))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), parameters(abstract))
    x = rng.normal(size=(1, rows, 8)).astype(np.float32)
    found = jax.jit(lambda params, x: bind(abstract, params)(x))(params, jnp.asarray(x))

    chosen, weights = routed_by_hand(x[0], np.asarray(params["router"]["kernel"]), 2, normalize)
    gate, up, down = (np.asarray(params[f"expert_{name}"]["kernel"]) for name in ("gate", "up", "down"))
    expected = np.zeros((rows, 8))
    for token in range(rows):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            inside = np.maximum(x[0, token] @ gate[expert], 0) * (x[0, token] @ up[expert])
            expected[token] += weight * (inside @ down[expert])
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-4)


def test_a_block_knows_its_stacked_layers_and_its_router():
    config = float_model("qwen3moe_mixed").config
    assert [config.layer_kind(index) for index in range(2)] == ["dense", "sparse"]
    abstract = config.abstract_block("sparse")
    assert "mlp.experts.down_proj" in linear_layers(abstract)
    assert "mlp.gate" not in linear_layers(abstract)
    assert list(float_layers(abstract)) == ["mlp.gate"]
    assert float_layers(config.abstract_block("dense")) == {}


def test_names_are_those_of_each_checkpoint():
    mixtral, qwen = (float_model(name).config for name in ("mixtral", "qwen3moe"))
    path = ("layers", 1, "block_sparse_moe", "experts", "w3", "kernel")
    assert mixtral.tensor_name(path) == ("model.layers.1.block_sparse_moe.experts.{expert}.w3.weight", True)
    path = ("layers", 1, "mlp", "experts", "up_proj", "kernel")
    assert qwen.tensor_name(path) == ("model.layers.1.mlp.experts.{expert}.up_proj.weight", True)


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
        ({"decoder_sparse_step": 1, "mlp_only_layers": None}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 5}, []),
        ({"num_local_experts": 0}, []),
    ],
)
def test_which_blocks_are_sparse(fields, sparse):
    config = architecture_from_config(cases.oracle("qwen3moe")["config"] | {"num_hidden_layers": 4} | fields)
    kinds = [config.of_kind(config.layer_kind(index)) for index in range(4)]
    assert [index for index, kind in enumerate(kinds) if kind.experts is not None] == sparse


def test_older_configs_say_num_experts():
    config = cases.oracle("qwen3moe")["config"]
    older = {key: value for key, value in config.items() if key != "num_local_experts"} | {"num_experts": 8}
    assert architecture_from_config(older) == architecture_from_config(config)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "cannot be routed to 5 of 4 experts"),
        ("mixtral", {"num_local_experts": "many"}, "num_local_experts='many' is not an integer"),
        ("qwen3moe", {"moe_intermediate_size": 0}, "intermediate_size=0 must be positive"),
        ("qwen3moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be positive"),
        ("qwen3moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers=.* is no list of layers"),
        ("qwen3moe", {"norm_topk_prob": 1}, "norm_topk_prob=1 is not true or false"),
    ],
)
def test_bad_configs_name_the_field(name, fields, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_config(cases.oracle(name)["config"] | fields)
