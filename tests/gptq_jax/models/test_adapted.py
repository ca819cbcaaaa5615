from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import own_modules
import pytest
import tiny_quantization
from flax import nnx

import gptq_jax
from gptq_jax import QuantSpec, SpecRules, adapt, gptq, quantize, rtn
from gptq_jax.calibration import Batch
from gptq_jax.tensor import QuantizedTensor

SPEC = QuantSpec(bits=4, group_size=16)
METHOD = gptq(grid="minmax")
TOKENS = [np.random.default_rng(seed).integers(0, own_modules.VOCAB, (3, 16), dtype=np.int32) for seed in range(2)]
CASES = [(flavour, scan) for flavour in ("linen", "nnx") for scan in (False, True)]
LAYERS = {
    "linen": ["attn.query", "attn.key", "attn.value", "attn.out", "up", "down"],
    "nnx": ["attn.q", "attn.kv", "attn.o", "up", "down"],
}


@lru_cache
def made(flavour, scan):
    """The adapted model, and how the user runs the module with any parameters."""
    if flavour == "linen":
        module, variables = own_modules.linen(scan=scan)
        return adapt(module, variables, blocks="layers"), lambda params, tokens: module.apply(
            {"params": params}, tokens
        )
    module = own_modules.in_nnx(scan=scan)
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def run(params, tokens):
        given = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(given, {key: numbered(value) for key, value in params.items()})
        return nnx.merge(graph, given, rest)(tokens)

    return adapt(module, blocks="layers"), run


def numbered(tree):
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: numbered(value) for key, value in tree.items()}


@lru_cache
def quantized(flavour, scan):
    return quantize(made(flavour, scan)[0], TOKENS, SPEC, METHOD)


def block_name(flavour, scan, index):
    return f"layers_{index}" if flavour == "linen" and not scan else f"layers.{index}"


@pytest.mark.parametrize(("flavour", "scan"), CASES)
def test_a_float_model_is_the_module(flavour, scan):
    model, run = made(flavour, scan)
    np.testing.assert_allclose(model(TOKENS[0]), run(model.params, TOKENS[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flavour", "scan"), CASES)
def test_the_packed_model_is_the_module_with_dequantized_parameters(flavour, scan):
    packed, _ = quantized(flavour, scan)
    _, run = made(flavour, scan)
    expected = run(packed.float_params(), TOKENS[0])
    np.testing.assert_allclose(packed(TOKENS[0]), expected, rtol=1e-3, atol=1e-4)
    leaves = jax.tree.leaves(packed.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    assert sum(isinstance(leaf, QuantizedTensor) for leaf in leaves) == len(LAYERS[flavour]) * (1 if scan else 2)


@pytest.mark.parametrize(("flavour", "scan"), CASES)
def test_every_layer_of_every_block_is_solved_in_order(flavour, scan):
    _, report = quantized(flavour, scan)
    names = [f"{block_name(flavour, scan, index)}.{path}" for index in range(2) for path in LAYERS[flavour]]
    assert [layer.path for layer in report.layers] == names
    assert all(layer.loss < layer.rtn_loss for layer in report.layers)
    assert all(layer.tokens == 96 for layer in report.layers)


@pytest.mark.parametrize(("flavour", "scan"), [("linen", True), ("nnx", False)])
def test_outputs_are_nearer_than_those_of_rounding(flavour, scan):
    model, run = made(flavour, scan)
    expected = run(model.params, TOKENS[0])
    rounded, _ = quantize(model, TOKENS, SPEC, rtn())
    by_gptq, by_rtn = (np.linalg.norm(m(TOKENS[0]) - expected) for m in (quantized(flavour, scan)[0], rounded))
    assert by_gptq < by_rtn


def test_a_stacked_model_is_the_same_as_one_of_separate_blocks():
    """The same weights under nnx.scan and in a list: the same codes."""
    module = own_modules.in_nnx(scan=False)
    stacked = own_modules.in_nnx(scan=True)
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    pure = nnx.to_pure_dict(nnx.state(stacked, nnx.Param))
    pure["layers"] = {i: jax.tree.map(lambda leaf, i=i: leaf[i], pure["layers"]) for i in range(2)}
    nnx.replace_by_pure_dict(state, pure)
    apart, _ = quantize(adapt(nnx.merge(graph, state, rest), blocks="layers"), TOKENS, SPEC, METHOD)
    together = quantized("nnx", True)[0].params["layers"]
    for index in range(2):
        own = apart.params["layers"][str(index)]
        for path in (("attn", "q", "kernel"), ("attn", "kv", "kernel"), ("up", "kernel"), ("down",)):
            found, expected = own, together
            for name in path:
                found, expected = found[name], expected[name]
            same = np.mean(np.asarray(found.codes) == np.asarray(expected.codes[index]))
            assert same > 0.98, path


def test_a_supplied_decoder_adapted_gets_the_same_codes():
    """Two ways to watch the same network: submodules replaced, and the trace of the whole."""
    model = tiny_quantization.float_model()

    class Decoder(nnx.Module):
        def __init__(self, config, params):
            from gptq_jax.hooks.nnx import bind

            self.embed = bind(config.abstract_embed(), params["embed"])
            self.layers = nnx.List(
                [bind(config.abstract_block(config.layer_kind(0)), block) for block in params["layers"]]
            )

        def __call__(self, tokens):
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            x = self.embed(tokens, positions)
            for layer in self.layers:
                x, _ = layer(x, positions, None, None)
            return x

    adapted = adapt(Decoder(model.config, model.params), blocks="layers")
    expected, first = quantize(model, tiny_quantization.BATCHES, SPEC, METHOD)
    found, second = quantize(adapted, tiny_quantization.BATCHES, SPEC, METHOD)
    assert {layer.path for layer in first.layers} == {layer.path for layer in second.layers}
    for index, block in enumerate(expected.params["layers"]):
        own = found.params["layers"][str(index)]
        for part, name in (
            ("self_attn", "v_proj"),
            ("self_attn", "o_proj"),
            ("mlp", "gate_proj"),
            ("mlp", "down_proj"),
        ):
            one, other = block[part][name]["kernel"], own[part][name]["kernel"]
            assert np.mean(np.asarray(one.codes) == np.asarray(other.codes)) > 0.97, (index, name)


def test_inputs_are_those_flax_captures():
    """The loss of rounding the second MLP product, from what Flax's own capture says its input was."""
    module, variables = own_modules.linen(layers=1)
    model = adapt(module, variables, blocks="layers")
    rules = SpecRules(default=SPEC, skip=("attn", "up"))
    packed, report = quantize(model, TOKENS[:1], rules, rtn())
    _, seen = module.apply(variables, TOKENS[0], capture_intermediates=True)
    x = np.asarray(jax.nn.gelu(seen["intermediates"]["layers_0"]["up"]["__call__"][0]), np.float64).reshape(-1, 64)
    kernel = np.asarray(variables["params"]["layers_0"]["down"]["kernel"], np.float64)
    rounded = np.asarray(packed.params["layers_0"]["down"]["kernel"].dequantize(), np.float64)
    expected = np.sum((x @ (kernel - rounded)) ** 2) / len(x)
    np.testing.assert_allclose(report.layers[0].loss, expected, rtol=1e-3)


def test_without_blocks_the_whole_model_is_one():
    module = own_modules.in_nnx(scan=True)
    packed, report = quantize(adapt(module), TOKENS, SPEC, METHOD)
    paths = [layer.path for layer in report.layers]
    assert paths[:5] == ["layers.attn.q[0]", "layers.attn.kv[0]", "layers.attn.o[0]", "layers.up[0]", "layers.down[0]"]
    assert paths[-1] == "head"
    assert packed.params["layers"]["up"]["kernel"].codes.shape[0] == 2


def test_what_stays_float_is_listed_with_the_reason():
    _, report = quantized("linen", False)
    assert report.kept_float == {"embed.embedding": "it is looked up by index, and it is the weight of a product too"}
    _, report = quantized("nnx", False)
    assert report.kept_float == {
        "embed.embedding": "it is looked up by index",
        "head": "it is used outside of the blocks",
    }


class Odd(nnx.Module):
    """Parameters that are used in every way but one product each."""

    def __init__(self, rngs):
        def param(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.fine, self.gain, self.scaled = param(8, 8), param(8, 8), param(8, 8)
        self.experts, self.branch, self.idle = param(2, 8, 8), param(8, 8), param(8, 8)

    def __call__(self, x, flag):
        x = x @ self.fine[...] + x * self.gain[...][None]
        x = x @ (2 * self.scaled[...])
        x = jnp.einsum("ebd,edf->ebf", jnp.stack([x[0], x[0]]), self.experts[...])[:1]
        return jax.lax.cond(flag, lambda x: x @ self.branch[...], lambda x: x, x)


def test_each_reason():
    model = adapt(Odd(nnx.Rngs(0)))
    _, report = quantize(model, [(np.ones((1, 8, 8), np.float32), np.bool_(True))], SPEC, rtn())
    assert [layer.path for layer in report.layers] == ["fine"]
    assert report.kept_float == {
        "gain": "'mul' is applied to it before any product",
        "scaled": "'mul' is applied to it before any product",
        "experts": "its product has batch axes, each with inputs of its own",
        "branch": "it is used inside a cond, which is not followed",
        "idle": "the call does not use it",
    }


class Calls(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)
        self.other = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, *, scale, deep, names=()):
        x = self.layer(x) * scale
        return {"y": self.other(x) if deep else x, "names": jnp.zeros(len(names))}


def test_any_signature_and_static_arguments():
    module = Calls(nnx.Rngs(0))
    batch = {"x": np.ones((4, 8), np.float32), "scale": jnp.float32(2), "deep": True, "names": ("a", "b")}
    packed, report = quantize(adapt(module), [batch], SPEC, rtn())
    assert [layer.path for layer in report.layers] == ["layer", "other"]
    shallow = {**batch, "deep": False}
    _, report = quantize(adapt(module), [shallow], SPEC, rtn())
    assert report.kept_float == {"other": "the call does not use it"}
    out = packed(**shallow)
    assert set(out) == {"y", "names"}
    assert out["names"].shape == (2,)


def test_padding_counts_for_nothing():
    module, variables = own_modules.linen(layers=1)
    model = adapt(module, variables, blocks="layers")
    mask = np.ones((3, 16), bool)
    mask[:, 12:] = False
    tokens, real = jnp.asarray(TOKENS[0]), jnp.asarray(mask)
    padded, report = quantize(model, [Batch((tokens, real), mask)], SPEC, METHOD)  # type: ignore[arg-type]
    short, _ = quantize(model, [TOKENS[0][:, :12]], SPEC, METHOD)
    assert report.layers[0].tokens == 36
    for name in ("up", "down"):
        one, other = (m.params["layers_0"][name]["kernel"].codes for m in (padded, short))
        assert np.mean(np.asarray(one) == np.asarray(other)) > 0.97


def test_batches_of_several_shapes():
    model, _ = made("nnx", False)
    _, report = quantize(model, [TOKENS[0], TOKENS[1][:2, :7]], SPEC, METHOD)
    assert {layer.tokens for layer in report.layers} == {3 * 16 + 2 * 7}


def test_the_module_is_left_alone():
    module = own_modules.in_nnx()
    before = [type(child) for _, child in nnx.iter_modules(module)]
    values = jax.tree.leaves(nnx.state(module))
    quantize(adapt(module, blocks="layers"), TOKENS, SPEC, METHOD)
    assert [type(child) for _, child in nnx.iter_modules(module)] == before
    assert all(one is other for one, other in zip(jax.tree.leaves(nnx.state(module)), values, strict=True))


@pytest.mark.slow  # what other tests have compiled is cleared
def test_compilations_do_not_grow_with_depth():
    counts = []
    for layers in (2, 4):
        model = adapt(own_modules.in_nnx(layers=layers), blocks="layers")
        jax.clear_caches()
        with tiny_quantization.compilations() as found:
            quantize(model, TOKENS, SPEC, rtn())
        counts.append(len(found))
    assert counts[0] == counts[1]


def test_a_second_call_compiles_nothing():
    packed, _ = quantized("nnx", True)
    packed(TOKENS[0])
    with tiny_quantization.compilations() as found:
        packed(TOKENS[1])
    assert found == []


def test_it_goes_through_jit_as_a_pytree():
    packed, _ = quantized("linen", True)
    expected = packed(TOKENS[0])
    np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(packed, TOKENS[0]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(packed)(TOKENS[0]), expected, rtol=1e-4, atol=1e-5)
    same = jax.tree.map(lambda leaf: leaf, packed)
    assert same.report == packed.report
    assert same.layouts == packed.layouts


def test_bfloat16_parameters():
    module, variables = own_modules.linen()
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    with jax.numpy_dtype_promotion("standard"):  # Linen's LayerNorm needs it
        packed, report = quantize(adapt(module, variables, blocks="layers"), TOKENS, SPEC, METHOD)
    assert all(0 < layer.loss < layer.rtn_loss for layer in report.layers)
    assert packed.float_params()["layers_0"]["up"]["kernel"].dtype == jnp.bfloat16


class Pointwise(nnx.Module):
    """A convolution of width one: a matrix product that is written as none."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 12, kernel_size=(1,), rngs=rngs)
        self.out = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.conv(x)))


def test_registered_layers(monkeypatch):
    from gptq_jax.hooks import registry

    monkeypatch.setattr(registry, "_KINDS", {})
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    model = adapt(Pointwise(nnx.Rngs(0)))
    _, report = quantize(model, [x], SPEC, METHOD)
    assert report.kept_float == {"conv": "'conv_general_dilated' is applied to it before any product"}
    gptq_jax.register_layer(nnx.Conv, weight="kernel", inputs=1)
    packed, report = quantize(model, [x], SPEC, METHOD)
    assert [(layer.path, layer.d_in, layer.d_out) for layer in report.layers] == [("conv", 8, 12), ("out", 12, 4)]
    dense = adapt(nnx.merge(*nnx.split(Pointwise(nnx.Rngs(0)))))
    expected = jax.tree.map(lambda leaf: leaf, dense)
    expected = type(dense)(dense.function, packed.float_params(), dense.state)
    np.testing.assert_allclose(packed(x), expected(x), rtol=1e-4, atol=1e-5)
    rows, kernel = x.reshape(-1, 8), np.asarray(model.params["conv"]["kernel"])[0]
    error = rows @ (kernel - np.asarray(packed.params["conv"]["kernel"].dequantize()))
    np.testing.assert_allclose(report.layers[0].loss, np.sum(error**2) / len(rows), rtol=1e-3)


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.layer(jax.nn.relu(self.layer(x))))


def test_tied_weights_are_refused_until_they_are_skipped():
    model, x = adapt(Twice(nnx.Rngs(0))), np.ones((3, 8), np.float32)
    with pytest.raises(
        ValueError, match=r"layer: layer.kernel is the weight of 2 products, and would be quantized for"
    ):
        quantize(model, [x], SPEC, rtn())
    _, report = quantize(model, [x], SpecRules(default=SPEC, skip=("^layer$",)), rtn())
    assert [layer.path for layer in report.layers] == ["last"]


def test_a_rule_for_a_tied_head_says_why_it_cannot_be():
    rules = SpecRules(default=SPEC, overrides=(("embedding", (("bits", 8),)),))
    with pytest.raises(ValueError, match=r"'embed.embedding', which stays float: it is looked up by index, and it is"):
        quantize(made("linen", False)[0], TOKENS, rules, rtn())


def test_slices_of_one_parameter_need_one_grid():
    rules = SpecRules(default=SPEC, overrides=((r"layers\.1\.up", (("bits", 8),)),))
    with pytest.raises(ValueError, match=r"layers\.0\.up, layers\.1\.up are slices of one parameter and need one grid"):
        quantize(made("nnx", True)[0], TOKENS, rules, rtn())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layer", "blocks='layer' names no module with parameters: did you mean 'layers'"),
        ("zzz", "blocks='zzz' names no module with parameters: did you mean 'embed', 'head', 'layers'"),
    ],
)
def test_blocks_that_match_nothing(blocks, message):
    with pytest.raises(ValueError, match=message):
        adapt(own_modules.in_nnx(), blocks=blocks)


def test_blocks_by_a_function():
    module, variables = own_modules.linen()
    model = adapt(module, variables, blocks=lambda path, module: isinstance(module, own_modules.LinenBlock))
    _, report = quantize(model, TOKENS, SPEC, rtn())
    assert [layer.path for layer in report.layers] == [layer.path for layer in quantized("linen", False)[1].layers]
    model = adapt(module, variables, blocks=lambda path, module: False)
    with pytest.raises(ValueError, match="LinenLM multiplies with no weight that can be packed in blocks="):
        quantize(model, TOKENS, SPEC, rtn())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{}], r"batches\[0\] gives NnxLM \(\), but missing a required argument: 'tokens'"),
        ([TOKENS[0], (TOKENS[0], 3)], r"batches\[1\] gives NnxLM \(ndarray, int\), but too many positional arguments"),
        ([{"tokens": TOKENS[0], "mask": None}], r"NnxLM \(tokens=, mask=\), but got an unexpected keyword"),
        ([], "batches is empty"),
        ([Batch(TOKENS[0], np.ones((3, 15), bool))], "sees 48 inputs, but the batch's mask has 45 tokens"),
    ],
)
def test_batches_that_do_not_fit_the_call(batches, message):
    with pytest.raises(ValueError, match=message):
        quantize(made("nnx", False)[0], batches, SPEC, rtn())


def test_arguments_that_are_neither_arrays_nor_hashable():
    with pytest.raises(ValueError, match="the call holds an argument that is neither an array nor hashable"):
        adapt(Calls(nnx.Rngs(0)))(np.ones((4, 8), np.float32), scale=jnp.float32(1), deep=True, names=({1, 2},))


def test_modules_and_parameters_that_do_not_fit():
    module, variables = own_modules.linen()
    with pytest.raises(ValueError, match="params is missing"):
        adapt(module)
    with pytest.raises(ValueError, match="an NNX module holds its own"):
        adapt(own_modules.in_nnx(), variables)
    with pytest.raises(TypeError):
        adapt({}, variables)
    broken = jax.tree.map(lambda leaf: leaf[:-1] if leaf.shape == (32, 64) else leaf, variables)
    with pytest.raises(ValueError, match=r"params do not fit LinenLM: .*up.*\(32, 64\)"):
        quantize(adapt(module, broken), TOKENS, SPEC, rtn())
    with pytest.raises(ValueError, match='params do not fit LinenLM: Could not find parameter named "embedding"'):
        adapt(module, {"layers_0": variables["params"]["layers_0"]})(TOKENS[0])


def test_random_numbers_and_lost_state_are_refused():
    module, variables = own_modules.linen()
    with pytest.raises(ValueError, match="LinenLM draws random numbers"):
        adapt(module, variables)(TOKENS[0], train=True)
    noisy = own_modules.NnxLM(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"NnxLM draws random numbers from layers\.0\.dropout.*model\.eval\(\)"):
        adapt(noisy)(TOKENS[0])

    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    with pytest.raises(ValueError, match=r"Normalized changes its BatchStat norm\.mean when called"):
        adapt(Normalized(nnx.Rngs(0)))(np.ones((2, 8), np.float32))


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized("nnx", False)[0], TOKENS, SPEC, rtn())


def test_registrations_that_cannot_be():
    with pytest.raises(TypeError, match="is no class of Linen or NNX modules"):
        gptq_jax.register_layer(dict)
    for inputs in ((), (0, 0), -1):
        with pytest.raises(ValueError, match="must name different axes of 'kernel'"):
            gptq_jax.register_layer(nn.Dense, inputs=inputs)
