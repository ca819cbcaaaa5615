"""Weights found in plain functions; modules come in models/test_adapted.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.hooks.evaluate import evaluate, hold, results
from gptq_jax.hooks.layout import Layout
from gptq_jax.hooks.program import Root, trace
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec

SPEC = QuantSpec(bits=8, group_size=4)
X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


@jax.custom_jvp
def own_gradient(w, x):
    return x @ w


own_gradient.defjvps(None, lambda tangent, out, w, x: tangent @ w)


# A product with the weight w of some shape, and the axes of x that it sums over.
PRODUCTS = {
    "matmul": ((8, 6), lambda w, x: x @ w),
    "transposed": ((6, 8), lambda w, x: x @ w.T),
    "cast": ((8, 6), lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
    "heads": ((8, 2, 3), lambda w, x: jnp.einsum("btd,dhk->bthk", x, w)),
    "heads out": ((2, 4, 6), lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(2, 3, 2, 4), w)),
    "heads mixed": ((4, 6, 2), lambda w, x: jnp.einsum("bthk,kdh->dbt", x.reshape(2, 3, 2, 4), w)),
    "weight first": ((6, 8), lambda w, x: jnp.einsum("fd,btd->fbt", w, x)),
    "split kernel": ((8, 6), lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(8, 2, 3))),
    "jit": ((8, 6), lambda w, x: jax.jit(jnp.matmul)(x, w)),
    "remat": ((8, 6), lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x)),
    "custom gradient": ((8, 6), lambda w, x: own_gradient(w, x)),
    "scan": ((4, 8, 8), lambda w, x: jax.lax.scan(lambda x, own: (jnp.tanh(x @ own), x.sum()), x, w)),
    "scan backwards": ((4, 8, 8), lambda w, x: jax.lax.scan(lambda x, own: (x @ own, None), x, w, reverse=True)[0]),
    "stacked on axis 1": (
        (8, 4, 8),
        lambda w, x: jax.lax.scan(lambda x, own: (x @ own, None), x, jnp.moveaxis(w, 1, 0))[0],
    ),
}


def run(function, shape, held, *, unroll=False, observe=None):
    shapes = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    program, out = trace(lambda params, args: function(params["w"], *args), shapes, [jax.typeof(X)], unroll=unroll)
    values = {**program.constants, program.arguments[0]: jnp.asarray(X)}
    evaluate(program.steps, values, held, observe)
    return program, jax.tree.unflatten(out, results(program, values, held))


@pytest.mark.parametrize("name", PRODUCTS)
def test_packed_products_are_those_of_the_dequantized_weight(name):
    shape, function = PRODUCTS[name]
    shapes = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    program, _ = trace(lambda params, args: function(params["w"], *args), shapes, [jax.typeof(X)], unroll=True)
    products = [product for _, product in program.products()]
    assert program.float_uses == {}
    assert len(products) == (4 if len(products[0].weight.stack) else 1)
    first = products[0]
    layout = Layout(shape=shape, dtype="float32", stack=first.weight.stack, inputs=first.inputs, outputs=first.outputs)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    quantize = lambda matrix: round_to_nearest(matrix, SPEC)  # noqa: E731
    packed = (jax.vmap(quantize) if layout.stack else quantize)(layout.matrix(weight))
    dequantize = lambda tensor: tensor.dequantize()  # noqa: E731
    rounded = layout.parameter((jax.vmap(dequantize) if layout.stack else dequantize)(packed))
    tolerance = 3e-2 if name == "cast" else 1e-4
    _, found = run(function, shape, {Root("w"): hold(packed, layout)})
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance),
        found,
        function(rounded, jnp.asarray(X)),
    )
    _, plain = run(function, shape, {Root("w"): hold(weight, None)})
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        plain,
        function(weight, jnp.asarray(X)),
    )


@pytest.mark.parametrize("name", ["matmul", "heads", "heads out", "heads mixed", "weight first"])
def test_rows_times_the_matrix_are_the_product(name):
    shape, function = PRODUCTS[name]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    seen = {}

    def observe(root, rows):
        seen[root] = rows
        return rows

    program, out = run(function, shape, {Root("w"): hold(weight, None)}, observe=observe)
    ((_, product),) = program.products()
    layout = Layout(shape=shape, dtype="float32", inputs=product.inputs, outputs=product.outputs)
    y = np.asarray(seen[Root("w")]) @ np.asarray(layout.matrix(weight))
    np.testing.assert_allclose(product.result(jnp.asarray(y)), out, rtol=1e-4, atol=1e-4)


def test_known_inputs_take_the_place_of_computed_ones():
    shape, function = PRODUCTS["heads out"]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    held = {Root("w"): hold(weight, None)}
    _, found = run(function, shape, held, observe=lambda root, rows: jnp.ones_like(rows))
    np.testing.assert_allclose(found, np.broadcast_to(np.asarray(weight).sum((0, 1)), (2, 3, 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "function", "reason"),
    [
        ((8, 8), lambda w, x: x + w[:3], "'slice' is applied to it"),
        ((8, 8), lambda w, x: x @ (w * 2), "'mul' is applied to it"),
        ((9, 8), lambda w, x: w[jnp.argmax(x, -1)], "it is looked up by index"),
        ((2, 8, 4), lambda w, x: jnp.einsum("btd,bdf->btf", x, w), "its product has batch axes"),
        ((8, 8), lambda w, x: w @ w, "its product is no matrix product"),
        ((8, 8), lambda w, x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, x), "used inside a while"),
    ],
)
def test_other_uses_say_what_they_are(shape, function, reason):
    with jax.numpy_rank_promotion("allow"):
        program, _ = trace(
            lambda params, args: function(params["w"], *args),
            {"w": jax.ShapeDtypeStruct(shape, jnp.float32)},
            [jax.typeof(X)],
            unroll=False,
        )
        weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
        _, found = run(function, shape, {Root("w"): hold(weight, None)})
        np.testing.assert_allclose(found, function(weight, jnp.asarray(X)), rtol=1e-4, atol=1e-5)
    assert reason in program.float_uses[Root("w")]


def test_casts_of_one_value_are_one_value():
    """Layers that cast their input each for itself still share it."""
    shapes = {name: jax.ShapeDtypeStruct((8, 4), jnp.float32) for name in "ab"}

    def function(params, args):
        (x,) = args
        return [x.astype(jnp.bfloat16) @ params[name].astype(jnp.bfloat16) for name in "ab"]

    program, _ = trace(function, shapes, [jax.typeof(X)], unroll=True)
    fed = {program.steps[number].inputs[0] for number, _ in program.products()}
    assert len(fed) == 1
