"""A kernel that JAX can neither differentiate nor batch: numpy in a callback."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import packed_weights
import pytest
from kernel_cases import inputs, packed

from pallas_kernels import api
from pallas_kernels.api import IMPLEMENTATIONS, Implementation, prepare, quantized_matmul

CASE = packed_weights.make(48, 10, group_size=16, symmetric=False)


def _callback(x, weight, d_out):
    shape = jax.ShapeDtypeStruct((x.shape[0], d_out), x.dtype)
    return jax.pure_callback(lambda x, weight: (np.asarray(x, np.float64) @ weight).astype(x.dtype), shape, x, weight)


def _run(x, arrays):
    assert x.ndim == 2
    return _callback(x, arrays["weight"], arrays["weight"].shape[1])


def _transposed(dy, arrays):
    return _callback(dy, arrays["weight"].T, arrays["weight"].shape[0])


def _dense(weight, dtype):
    return {"weight": jnp.asarray(CASE.weight, jnp.float32), "planes": weight.codes}


FAKE = Implementation(lambda problem: None, _run, _dense, _transposed)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"fake": FAKE, **IMPLEMENTATIONS})


@pytest.fixture
def weight():
    return prepare(packed(CASE), "fake")


def test_the_kernel_alone_has_no_gradient_and_no_batching(weight):
    x = jnp.array(inputs(3, 48))
    with pytest.raises(ValueError, match="JVP"):
        jax.grad(lambda x: _run(x, weight.arrays).sum())(x)
    with pytest.raises(NotImplementedError):
        jax.vmap(lambda x: _run(x, weight.arrays))(x[:, None])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_gradient(weight, wrap):
    x, out = inputs(2, 3, 48), inputs(2, 3, 10, seed=2)
    found = jax.grad(wrap(lambda x: jnp.sum(out * quantized_matmul(x, weight))))(jnp.array(x))
    np.testing.assert_allclose(found, out @ CASE.weight.T, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_vmap_and_vmap_of_a_gradient(weight):
    x, out = inputs(4, 3, 48), inputs(4, 3, 10, seed=2)
    expected = out @ CASE.weight.T

    def loss(x, out):
        return jnp.sum(out * quantized_matmul(x, weight))

    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(x, out), expected, rtol=1e-4, atol=1e-4)
    total = jax.grad(lambda x: jax.vmap(loss)(x, out).sum())(jnp.array(x))
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    y = jax.jit(jax.vmap(jax.vmap(lambda x: quantized_matmul(x, weight))))(jnp.array(x))
    np.testing.assert_allclose(y, x @ CASE.weight, rtol=1e-4, atol=1e-4)


def test_batched_weights_are_taken_one_after_another():
    cases = [packed_weights.make(48, 10, group_size=16, seed=seed) for seed in range(3)]
    arrays = {"weight": jnp.stack([jnp.asarray(case.weight, jnp.float32) for case in cases])}
    x = inputs(3, 2, 48)
    product = api._product(FAKE)
    for axes, rows in (((0, 0), x), ((None, 0), x[0])):
        y = jax.vmap(product, in_axes=axes)(jnp.array(rows), arrays)
        for expert, case in enumerate(cases):
            mine = x[expert] if axes[0] == 0 else x[0]
            np.testing.assert_allclose(y[expert], mine @ case.weight, rtol=1e-4, atol=1e-4)


def test_low_rank_adapters_learn(weight):
    """y = x W + x A B: gradients reach A and B of this layer, and x, so those of the layers before it."""
    rng = np.random.default_rng(3)
    params = {"a": jnp.array(rng.normal(size=(48, 2)), jnp.float32), "b": jnp.zeros((2, 10))}
    first = jnp.array(rng.normal(size=(48, 48)), jnp.float32) / 7
    x, goal = jnp.array(inputs(16, 48)), jnp.array(inputs(16, 10, seed=5))

    @jax.jit
    def loss(params, first):
        hidden = jnp.tanh(x @ first)
        return jnp.mean((quantized_matmul(hidden, weight) + hidden @ params["a"] @ params["b"] - goal) ** 2)

    def dense_loss(params, first):
        hidden = jnp.tanh(x @ first)
        product = jnp.matmul(hidden, jnp.asarray(CASE.weight, jnp.float32), precision="highest")
        return jnp.mean((product + hidden @ params["a"] @ params["b"] - goal) ** 2)

    found = jax.grad(loss, argnums=(0, 1))(params, first)
    expected = jax.grad(dense_loss, argnums=(0, 1))(params, first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)
    assert np.abs(found[0]["b"]).max() > 0


def test_no_silent_zero_gradient_in_scales(weight):
    def loss(dense):
        arrays = {**weight.arrays, "weight": dense}
        return api._product(FAKE)(jnp.ones((1, 48)), arrays).sum()

    with pytest.raises(NotImplementedError, match="no gradient in the scales"):
        jax.grad(loss)(weight.arrays["weight"])


@pytest.mark.parametrize("implementation", ["xla_tiled", "reference"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_forward_mode_of_the_xla_paths(implementation, tokens):
    x, tangent = inputs(tokens, 48), inputs(tokens, 48, seed=2)
    weight = prepare(packed(CASE), implementation)
    _, found = jax.jvp(lambda x: quantized_matmul(x, weight), (jnp.array(x),), (jnp.array(tangent),))
    np.testing.assert_allclose(found, tangent @ CASE.weight, rtol=1e-4, atol=1e-4)


def test_no_tokens(weight):
    assert quantized_matmul(jnp.ones((0, 48)), weight).shape == (0, 10)


def _interpreted():
    compat = pytest.importorskip("pallas_kernels.mosaic_gpu.compat")
    with contextlib.ExitStack() as stack:
        if jax.__version_info__[:3] < compat.OLDEST_JAX:
            pytest.skip(f"Mosaic kernels are interpreted by jax {compat.OLDEST_JAX} and newer")
        stack.enter_context(compat.interpret())
        return stack.pop_all()


@pytest.mark.parametrize("name", ["mosaic_hopper", "mosaic_ampere"])
def test_real_kernels_through_the_dispatcher(name, monkeypatch):
    """Product, bias, vmap and gradient of a shuffled weight, interpreted."""
    monkeypatch.setattr(api, "IMPLEMENTATIONS", IMPLEMENTATIONS)
    case = packed_weights.make(160, 72, group_size=32, symmetric=False)
    x = jnp.array(inputs(2, 3, 160)).astype(jnp.bfloat16)
    out = inputs(2, 3, 72, seed=2)
    x64 = np.asarray(x, np.float64)
    with _interpreted():
        weight = prepare(packed(case), name, jnp.bfloat16)
        assert weight.implementation == name
        y = quantized_matmul(x, weight, bias=jnp.ones(72))
        mapped = jax.vmap(lambda x: quantized_matmul(x, weight))(x)
        dx = jax.grad(lambda x: jnp.sum(out * quantized_matmul(x, weight).astype(jnp.float32)))(x)
    for found, expected in ((y, x64 @ case.weight + 1), (mapped, x64 @ case.weight), (dx, out @ case.weight.T)):
        error = np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
        assert error < 6e-3
