import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptq_jax.hooks.nnx import bind, linear_layers, parameters, record_inputs
from gptq_jax.matmul import prepare
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec


class Inner(nnx.Module):
    def __init__(self, size, *, rngs):
        self.stack = nnx.List([nnx.Linear(size, size, use_bias=False, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(size, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.stack:
            x = jax.nn.relu(layer(x))
        return self.out(x)


class Outer(nnx.Module):
    def __init__(self, size, *, rngs):
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.inner = Inner(size, rngs=rngs)

    def __call__(self, x):
        return self.inner(self.norm(x))


ABSTRACT = nnx.eval_shape(lambda: Outer(32, rngs=nnx.Rngs(0)))
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)


@pytest.fixture
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), parameters(ABSTRACT))


def by_hand(params, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    norm, inner = params["norm"], params["inner"]
    x = (x - mean) / np.sqrt(var + 1e-6) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    inputs = {}
    for index in (0, 1):
        inputs[f"inner.stack.{index}"] = x
        x = np.maximum(x @ np.asarray(inner["stack"][str(index)]["kernel"]), 0)
    inputs["inner.out"] = x
    return x @ np.asarray(inner["out"]["kernel"]) + np.asarray(inner["out"]["bias"]), inputs


def test_bind_holds_the_parameters_and_leaves_the_abstract_module_alone(params):
    found = jax.jit(lambda params, x: bind(ABSTRACT, params)(x))(params, X)
    np.testing.assert_allclose(found, by_hand(params, np.asarray(X, np.float64))[0], rtol=1e-4, atol=1e-4)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(parameters(ABSTRACT)))


def test_inputs_are_recorded_by_path(params):
    @jax.jit
    def record(params, x):
        module = bind(ABSTRACT, params)
        assert set(linear_layers(module)) == {"inner.stack.0", "inner.stack.1", "inner.out"}
        tape = record_inputs(module)
        out = module(x)
        assert list(tape) == ["inner.stack.0", "inner.stack.1", "inner.out"]  # in the order of the calls
        return out, tape

    out, tape = record(params, X)
    expected, inputs = by_hand(params, np.asarray(X, np.float64))
    for path, value in inputs.items():
        np.testing.assert_allclose(tape[path], value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_known_inputs_take_the_place_of_computed_ones(params):
    module = bind(ABSTRACT, params)
    tape = record_inputs(module, {"inner.out": jnp.ones((1, 32))})
    expected = params["inner"]["out"]["kernel"].sum(axis=0) + params["inner"]["out"]["bias"]
    np.testing.assert_allclose(module(X)[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(tape["inner.out"], np.ones((1, 32)))


def test_a_second_call_of_a_layer_is_refused(params):
    module = bind(ABSTRACT, params)
    record_inputs(module)
    module(X)
    with pytest.raises(NotImplementedError, match=r"'inner.stack.0' is called twice"):
        module(X)


@pytest.mark.parametrize("prepared", [False, True])
def test_quantized_kernels_take_the_place_of_float_ones(params, prepared):
    spec = QuantSpec(bits=4, group_size=16)
    dense, packed = dict(params), dict(params)
    for name in ("out", "stack"):
        layers = params["inner"][name]
        layers = {"": layers} if name == "out" else layers
        tensors = {key: round_to_nearest(layer["kernel"], spec) for key, layer in layers.items()}
        floats = {key: {**layers[key], "kernel": tensor.dequantize()} for key, tensor in tensors.items()}
        kernels = {key: prepare(tensor) if prepared else tensor for key, tensor in tensors.items()}
        quantized = {key: {**layers[key], "kernel": kernel} for key, kernel in kernels.items()}
        for target, new in ((dense, floats), (packed, quantized)):
            target["inner"] = {**target["inner"], name: new[""] if name == "out" else new}
    run = jax.jit(lambda params, x: bind(ABSTRACT, params)(x))
    np.testing.assert_allclose(run(packed, X), run(dense, X), rtol=1e-4, atol=1e-4)
    assert np.abs(run(packed, X) - run(params, X)).max() > 1e-3


def test_parameters_without_a_place_are_refused(params):
    with pytest.raises(ValueError, match="parameter 'lora' has no place in Inner"):
        bind(ABSTRACT, {"inner": {"lora": {"kernel": jnp.ones((32, 4))}}})
