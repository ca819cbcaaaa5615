"""Models with experts against transformers' logits, and sparse MLPs against numpy, an expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_models import DIRECTORY, NAMES, float_model, oracle, routed_by_hand
from flax import nnx

from gptq_jax.generate import generate_tokens
from gptq_jax.hooks.nnx import bind, float_layers, linear_layers, parameters
from gptq_jax.models.base import run_block
from gptq_jax.models.experts import Experts, SparseMLP
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.safetensors import read_json


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    tokens, expected = oracle(name)
    logits = np.asarray(float_model(name)(tokens))
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 5e-6


@pytest.mark.parametrize("name", NAMES[1:])
def test_greedy_tokens_from_a_cache_are_those_of_the_whole_forward_pass(name):
    model, tokens = float_model(name), oracle(name)[0][0, :9]
    found = list(generate_tokens(model, tokens, max_new_tokens=8, stop_tokens=()))
    whole = list(map(int, tokens))
    for _ in range(8):
        padded = np.zeros((1, 17), np.int32)  # later tokens are not seen
        padded[0, : len(whole)] = whole
        whole.append(int(np.argmax(model(padded)[0, len(whole) - 1])))
    assert found == whole[9:]


def test_a_step_from_a_cache_is_the_whole_forward_pass():
    model = float_model("mixtral")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
    block = model.params["layers"][0]
    whole, _ = run_block(model.config, "sparse", block, x)
    cache = model.config.init_cache(2, 8)
    for time in range(6):
        positions = jnp.full((1, 1), time, jnp.int32)
        step, cache = run_block(model.config, "sparse", block, x[:, time : time + 1], positions, cache)
        np.testing.assert_allclose(step[:, 0], whole[:, time], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    model = float_model("qwen3_moe")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 32)), jnp.float32)
    alone, _ = run_block(model.config, "sparse", model.params["layers"][0], x)
    padded = jnp.concatenate([jnp.full((1, 5, 32), 3.0), x], axis=1)
    mask = jnp.arange(17)[None] >= 5
    out, _ = run_block(model.config, "sparse", model.params["layers"][0], padded, mask=mask)
    np.testing.assert_allclose(out[:, 5:], alone, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_each_token_by_its_experts(normalize, rows):
    experts = Experts(count=5, top_k=2, intermediate_size=12, normalize=normalize)
    abstract = nnx.eval_shape(lambda: SparseMLP(8, experts, jax.nn.relu, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), parameters(abstract))
    x = rng.normal(size=(1, rows, 8)).astype(np.float32)
    found = jax.jit(lambda params, x: bind(abstract, params)(x))(params, jnp.asarray(x))

    chosen, weights = routed_by_hand(x[0], np.asarray(params["gate"]["kernel"]), 2, normalize)
    gate, up, down = (np.asarray(params["experts"][f"{name}_proj"]["kernel"]) for name in ("gate", "up", "down"))
    expected = np.zeros((rows, 8))
    for token in range(rows):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            inside = np.maximum(x[0, token] @ gate[expert], 0) * (x[0, token] @ up[expert])
            expected[token] += weight * (inside @ down[expert])
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-4)


def test_a_block_knows_its_stacked_layers_and_its_router():
    config = float_model("qwen3_moe_mixed").config
    assert [config.layer_kind(index) for index in range(2)] == ["decoder", "sparse"]
    assert config.experts.dense_layers == (0,)
    abstract = config.abstract_block("sparse")
    assert "mlp.experts.down_proj" in linear_layers(abstract)
    assert "mlp.gate" not in linear_layers(abstract)
    assert list(float_layers(abstract)) == ["mlp.gate"]
    assert float_layers(config.abstract_block("decoder")) == {}


def test_names_are_those_of_each_checkpoint():
    path = ("layers", 1, "mlp", "experts", "up_proj", "kernel")
    stored = {name: float_model(name).config.tensor_name(path) for name in ("mixtral", "qwen3_moe")}
    assert stored["mixtral"] == ("model.layers.1.block_sparse_moe.experts.{expert}.w3.weight", True)
    assert stored["qwen3_moe"] == ("model.layers.1.mlp.experts.{expert}.up_proj.weight", True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": None}, ()),
    ],
)
def test_which_blocks_are_sparse(fields, expected):
    config = read_json(DIRECTORY / "qwen3_moe" / "config.json") | {"num_hidden_layers": 4} | fields
    assert architecture_from_config(config).experts.dense_layers == expected


def test_older_configs_say_num_experts():
    config = read_json(DIRECTORY / "qwen3_moe" / "config.json")
    older = {key: value for key, value in config.items() if key != "num_local_experts"} | {"num_experts": 8}
    assert architecture_from_config(older) == architecture_from_config(config)
    dense = architecture_from_config(older | {"num_experts": 0})
    assert dense.experts is None
    assert dense.layer_kind(0) == "decoder"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "cannot be routed to 5 of 4 experts"),
        ("mixtral", {"num_local_experts": "many"}, "num_local_experts='many' is not an integer"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "intermediate_size=0 must be positive"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be positive"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers=.* is no list of layers"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob=1 is not true or false"),
    ],
)
def test_bad_configs_name_the_field(name, fields, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_config(read_json(DIRECTORY / name / "config.json") | fields)
