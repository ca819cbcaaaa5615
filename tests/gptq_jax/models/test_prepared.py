"""Fused products against the same model with every product by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_quantization import float_model

from gptq_jax.generate import generate_tokens
from gptq_jax.hooks.nnx import FUSED, bind, linear_layers, record_inputs, with_kernel
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.base import capture_block, linear_paths
from gptq_jax.models.prepared import prepare
from gptq_jax.pipeline import is_quantized, quantize
from gptq_jax.spec import QuantSpec
from gptq_jax.storage import save
from gptq_jax.tensor import QuantizedTensor

SPEC = QuantSpec(bits=4, group_size=16, symmetric=False, scale_dtype="float16")
OTHER = QuantSpec(bits=8, group_size=32)
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
TOKENS = np.random.default_rng(3).integers(0, 96, (2, 24), dtype=np.int32)


def quantized(model, spec_of=lambda path: SPEC):
    """Rounded to nearest, each layer on the grid that `spec_of` gives; None stays float."""

    def block(params):
        for path in linear_paths(model.config, "decoder"):
            if (spec := spec_of(path)) is not None:
                parent, name = path.split(".")
                params = with_kernel(params, path, round_to_nearest(params[parent][name]["kernel"], spec))
        return params

    return replace(model, params={**model.params, "layers": [block(params) for params in model.params["layers"]]})


def dequantized(model):
    packed = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    params = jax.tree.map(lambda leaf: leaf.dequantize() if packed(leaf) else leaf, model.params, is_leaf=packed)
    return replace(model, params=params)


def fused_paths(model):
    return [fused.paths for fused in model.params["layers"][0].get(FUSED, [])]


@pytest.mark.parametrize("case", ["tied_gqa", "biases"])
def test_the_same_logits_and_the_same_greedy_tokens(case):
    model = quantized(float_model(case=case))
    fused, apart = prepare(model), prepare(model, fuse=False)
    assert fused_paths(fused) == [QKV, GATE_UP]
    assert fused_paths(apart) == []
    expected = dequantized(model)(TOKENS)
    for found in (fused, apart, model):
        np.testing.assert_allclose(found(TOKENS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    tokens = [list(generate_tokens(each, TOKENS[0], max_new_tokens=20, stop_tokens=())) for each in (fused, apart)]
    assert tokens[0] == tokens[1]


def test_layers_of_another_grid_or_float_are_left_apart():
    specs = {"self_attn.k_proj": OTHER, "mlp.up_proj": None}
    model = quantized(float_model(), lambda path: specs.get(path, SPEC))
    ready = prepare(model)
    assert fused_paths(ready) == [("self_attn.q_proj", "self_attn.v_proj")]
    block = ready.params["layers"][0]
    assert block["mlp"]["up_proj"]["kernel"] is model.params["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert block["self_attn"]["k_proj"]["kernel"].problem.bits == 8
    expected = dequantized(model)(TOKENS)
    np.testing.assert_allclose(ready(TOKENS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_orders_of_inputs_that_differ_are_left_apart():
    def ordered(tensor, seed):
        order = np.random.default_rng(seed).permutation(np.arange(48, dtype=np.int32) // 16)
        return replace(tensor, group_of_row=jnp.array(order))

    model = quantized(float_model())
    params = model.params["layers"][0]
    for path, seed in zip((*QKV, *GATE_UP), (1, 1, 2, 3, 3), strict=True):
        parent, name = path.split(".")
        params = with_kernel(params, path, ordered(params[parent][name]["kernel"], seed))
    model = replace(model, params={**model.params, "layers": [params, model.params["layers"][1]]})
    ready = prepare(model)
    assert fused_paths(ready) == [QKV[:2], GATE_UP]
    expected = dequantized(model)(TOKENS)
    np.testing.assert_allclose(ready(TOKENS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_product_for_layers_of_one_input():
    ready = prepare(quantized(float_model()))
    config, params = ready.config, ready.params["layers"][0]

    def products(params):
        jaxpr = jax.make_jaxpr(
            lambda x: bind(config.abstract_block("decoder"), params)(x, jnp.arange(5)[None], None, None)
        )(jnp.ones((1, 5, 48)))
        return str(jaxpr).count("name=_run")

    apart = prepare(quantized(float_model()), fuse=False).params["layers"][0]
    assert (products(params), products(apart)) == (4, 7)


def test_inputs_of_fused_layers_can_be_recorded():
    model = quantized(float_model())
    ready = prepare(model)
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 5, 48)), jnp.float32)
    wanted = linear_paths(model.config, "decoder")
    tapes = [capture_block(each.config, "decoder", each.params["layers"][0], x, wanted) for each in (model, ready)]
    for path in wanted:
        np.testing.assert_allclose(tapes[1][path], tapes[0][path], rtol=1e-4, atol=1e-4)
    module = bind(ready.config.abstract_block("decoder"), ready.params["layers"][0])
    assert set(linear_layers(module)) == set(wanted)
    assert not record_inputs(module)


def test_another_input_of_a_fused_layer_is_its_own_product():
    ready = prepare(quantized(float_model()))
    module = bind(ready.config.abstract_block("decoder"), ready.params["layers"][0]).self_attn
    one, other = jnp.ones((1, 48)), jnp.arange(48.0)[None]
    query, key = module.q_proj(one), module.k_proj(other)
    np.testing.assert_allclose(
        module.q_proj(other)[0, 0], module.q_proj(one * 1)[0, 0] * 0 + module.q_proj(other)[0, 0]
    )
    assert np.abs(module.k_proj(one) - key).max() > 1e-3
    np.testing.assert_array_equal(module.q_proj(one), query)


def test_a_prepared_model_is_neither_saved_nor_quantized(tmp_path):
    ready = prepare(quantized(float_model()))
    assert is_quantized(ready)
    with pytest.raises(ValueError, match="prepared to run here: save the model it was prepared from"):
        save(ready, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(ready, [TOKENS])
    with pytest.raises(ValueError, match="no packed weights to prepare"):
        prepare(ready)


def test_a_float_model_has_nothing_to_prepare():
    with pytest.raises(ValueError, match="no packed weights to prepare: quantize it"):
        prepare(float_model())
