"""Statistics of experts against numpy, an expert at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_methods import clip_search

from gptq_jax.hooks.experts import route
from gptq_jax.methods.base import LayerBatch, with_hessian
from gptq_jax.methods.gptq import gptq
from gptq_jax.methods.rtn import rtn
from gptq_jax.spec import QuantSpec
from gptq_jax.statistics import ExpertStats, init_experts, solve_experts, update_experts

EXPERTS, TOP_K, D_IN, D_OUT, TOKENS = 6, 2, 24, 16, 70
SPEC = QuantSpec(bits=3, group_size=8, symmetric=False)


def batch(seed):
    """Rows, the experts of each (the last is never chosen), and which are real."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, D_IN)).astype(np.float32)
    weighted = rng.random((TOKENS, EXPERTS - 1)) ** np.arange(1, EXPERTS)  # some experts see more
    return x, np.argsort(-weighted, axis=1)[:, :TOP_K].astype(np.int32), rng.random(TOKENS) < 0.8


def observed(method, seeds=(0, 1)):
    stats = init_experts(method, EXPERTS, D_IN, D_OUT)
    for seed in seeds:
        x, experts, real = batch(seed)
        weights = jnp.asarray(np.sort(np.random.default_rng(seed).random(experts.shape))[:, ::-1], jnp.float32)
        routed = route(jnp.asarray(x), jnp.asarray(experts), weights, EXPERTS)
        stats = update_experts(stats, routed, jnp.asarray(real), update=method.update)
    return stats


def rows_by_hand(expert, seeds=(0, 1)):
    found = []
    for seed in seeds:
        x, experts, real = batch(seed)
        found.append(x[(experts == expert).any(axis=1) & real])
    return np.concatenate(found).astype(np.float64)


def test_each_experts_hessian_is_of_the_real_tokens_routed_to_it():
    stats = observed(gptq())
    for expert in range(EXPERTS):
        rows = rows_by_hand(expert)
        assert stats.rows[expert] == len(rows)
        np.testing.assert_allclose(stats.own[expert], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert stats.rows[-1] == 0
    assert not stats.own[-1].any()


def test_shared_statistics_are_of_every_real_token_once():
    rows = np.concatenate([batch(seed)[0][batch(seed)[2]] for seed in (0, 1)]).astype(np.float64)
    np.testing.assert_allclose(observed(gptq()).shared, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_shared_statistics_are_of_what_the_likeliest_expert_is_fed():
    x, experts, _ = batch(0)
    routed = route(jnp.asarray(x), jnp.asarray(experts), jnp.full(experts.shape, 0.5), EXPERTS)
    scale = jnp.repeat(jnp.arange(1.0, EXPERTS + 1), routed.sizes, total_repeat_length=TOKENS * TOP_K)
    method = gptq()
    stats = update_experts(
        init_experts(method, EXPERTS, D_IN, D_OUT),
        routed._replace(rows=routed.rows * scale[:, None]),
        jnp.ones(TOKENS, bool),
        update=method.update,
    )
    rows = x.astype(np.float64) * (experts[:, :1] + 1)
    np.testing.assert_allclose(stats.shared, rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_the_order_of_tokens_is_lost_nowhere():
    x, experts, _ = batch(0)
    routed = route(jnp.asarray(x), jnp.asarray(experts), jnp.ones(experts.shape), EXPERTS)
    np.testing.assert_array_equal(routed.rows, x[np.asarray(routed.token)])
    np.testing.assert_array_equal(np.asarray(routed.rows)[np.asarray(routed.row)], np.repeat(x[:, None], TOP_K, axis=1))
    np.testing.assert_array_equal(routed.sizes, np.bincount(experts.reshape(-1), minlength=EXPERTS))


@pytest.mark.parametrize("method", [gptq(order="natural"), rtn(), clip_search()], ids=["gptq", "rtn", "own"])
def test_any_method_solves_each_expert_as_if_it_were_alone(method):
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(EXPERTS, D_IN, D_OUT)), jnp.float32)
    whole = with_hessian(method)
    stats = observed(whole)
    shares = jnp.arange(EXPERTS) >= 4
    found = solve_experts(weights, stats, shares, solve=whole.solve, spec=SPEC)
    tensor = getattr(found, "tensor", found)
    assert tensor.shape == weights.shape
    for expert in (0, 3, 5):
        rows = (
            rows_by_hand(expert) if expert < 4 else np.concatenate([batch(seed)[0][batch(seed)[2]] for seed in (0, 1)])
        )
        alone = method.update(method.init(D_IN, D_OUT), LayerBatch(jnp.asarray(rows, jnp.float32)))
        expected = method.solve(weights[expert], alone, SPEC)
        expected = getattr(expected, "tensor", expected)
        one = jax.tree.map(lambda leaf, expert=expert: leaf[expert], tensor).dequantize()
        np.testing.assert_allclose(one, expected.dequantize(), rtol=1e-4, atol=1e-4)


def test_a_method_without_a_hessian_gets_one():
    method = with_hessian(rtn())
    assert with_hessian(rtn()) is method
    assert with_hessian(gptq()) is gptq()
    stats = observed(method)
    assert isinstance(stats, ExpertStats)
    np.testing.assert_allclose(method.hessian(stats.own), observed(gptq()).own, rtol=1e-5, atol=1e-5)


def test_an_update_costs_the_rows_not_experts_times_tokens():
    """The products inside the loop are of one chunk, and there are as many turns as chunks with a row."""
    method = gptq()
    x, experts, real = batch(0)
    routed = route(jnp.asarray(x), jnp.asarray(experts), jnp.ones(experts.shape), EXPERTS)
    shapes = init_experts(method, EXPERTS, D_IN, D_OUT)
    text = str(jax.make_jaxpr(partial(update_experts, update=method.update))(shapes, routed, jnp.asarray(real)))
    assert text.count("dot_general") == 2  # a chunk's, and that of all tokens
    assert "while" in text
