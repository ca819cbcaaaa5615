from dataclasses import dataclass, replace

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import build
from flax import nnx

from gptq_jax.hooks.nnx import parameters
from gptq_jax.models import base
from gptq_jax.models.base import capture_block, input_groups, linear_paths, run_block
from gptq_jax.models.decoder import DecoderConfig

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PATHS = tuple(path for group in GROUPS for path in group)
BIASED = build(decoder_cases.CASES["biases"])
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 48)), jnp.float32)


@pytest.mark.parametrize("name", decoder_cases.CASES)
def test_layers_with_one_input_are_found_by_tracing(name):
    config = build(decoder_cases.CASES[name]).config
    assert input_groups(config, "decoder") == GROUPS
    assert linear_paths(config, "decoder") == PATHS


def test_captured_inputs_are_what_the_layers_multiply():
    block = BIASED.params["layers"][1]
    inputs = capture_block(BIASED.config, "decoder", block, X, PATHS)
    gate, up, down = (block["mlp"][name] for name in ("gate_proj", "up_proj", "down_proj"))
    hidden = inputs["mlp.gate_proj"]
    np.testing.assert_array_equal(hidden, inputs["mlp.up_proj"])
    gated = jax.nn.gelu(hidden @ gate["kernel"] + gate["bias"][None, None], approximate=False)
    expected = gated * (hidden @ up["kernel"] + up["bias"][None, None])
    np.testing.assert_allclose(inputs["mlp.down_proj"], expected, rtol=1e-5, atol=1e-5)
    out = block["self_attn"]["o_proj"]
    middle = X + inputs["self_attn.o_proj"] @ out["kernel"] + out["bias"][None, None]
    after = middle + inputs["mlp.down_proj"] @ down["kernel"] + down["bias"][None, None]
    np.testing.assert_allclose(run_block(BIASED.config, "decoder", block, X)[0], after, rtol=1e-5, atol=1e-5)


def test_nothing_that_is_not_wanted_is_computed():
    def flops(*wanted, known=()):
        block = BIASED.params["layers"][0]
        given = capture_block(BIASED.config, "decoder", block, X, tuple(known))
        lowered = base._capture_block.lower(BIASED.config, "decoder", block, X, None, wanted, given)
        return lowered.compile().cost_analysis()["flops"]

    normalize, attend, mlp = flops("self_attn.q_proj"), flops("self_attn.o_proj"), flops("mlp.down_proj")
    assert normalize < attend / 10
    assert attend < mlp
    assert flops("mlp.gate_proj", known=["self_attn.o_proj"]) < attend


def test_known_inputs_change_nothing_but_the_work():
    block = BIASED.params["layers"][0]
    known = capture_block(BIASED.config, "decoder", block, X, ("self_attn.o_proj",))
    for wanted in GROUPS[1:]:
        full = capture_block(BIASED.config, "decoder", block, X, wanted)
        for path, value in capture_block(BIASED.config, "decoder", block, X, wanted, known=known).items():
            np.testing.assert_allclose(value, full[path], rtol=1e-5, atol=1e-5)
    full, _ = run_block(BIASED.config, "decoder", block, X)
    shortcut, _ = run_block(BIASED.config, "decoder", block, X, known=known)
    np.testing.assert_allclose(shortcut, full, rtol=1e-5, atol=1e-5)
    zeros = {path: jnp.zeros_like(value) for path, value in known.items()}
    assert np.abs(run_block(BIASED.config, "decoder", block, X, known=zeros)[0] - full).max() > 0.1


def test_capture_refuses_layers_that_are_not_there():
    block = BIASED.params["layers"][0]
    with pytest.raises(ValueError, match=r"no linear layer \['mlp.nope'\]: the block has \['self_attn.q_proj'"):
        capture_block(BIASED.config, "decoder", block, X, ("mlp.nope",))
    with pytest.raises(ValueError, match=r"no linear layers \['typo'\]"):
        run_block(BIASED.config, "decoder", block, X, known={"typo": X})


def test_mask_and_cache_are_refused_together():
    cache = BIASED.config.init_cache(2, 16)
    with pytest.raises(ValueError, match="mask and cache cannot be combined"):
        run_block(BIASED.config, "decoder", BIASED.params["layers"][0], X, None, cache, mask=jnp.ones((2, 9), bool))


class Layers(nnx.Module):
    def __init__(self, size, *, rngs):
        self.used = nnx.List([nnx.Linear(size, size, rngs=rngs), nnx.Linear(size, size, rngs=rngs)])
        self.spare = nnx.Linear(size, size, rngs=rngs)


class InTurn(Layers):
    def __call__(self, x, positions, cache, mask):
        return self.used[1](self.used[0](x)) + self.spare(x), cache


class LeavesOneOut(Layers):
    def __call__(self, x, positions, cache, mask):
        return self.used[1](self.used[0](x)), cache


class CallsOneTwice(Layers):
    def __call__(self, x, positions, cache, mask):
        return self.spare(self.used[1](self.used[0](self.used[0](x)))), cache


@dataclass(frozen=True, kw_only=True)
class Custom(DecoderConfig):
    block: type

    def abstract_block(self, kind):
        return nnx.eval_shape(lambda: self.block(4, rngs=nnx.Rngs(0)))


def custom(block):
    sizes = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "head_dim": 4, "context_length": 8}
    return Custom(num_layers=1, num_heads=1, num_kv_heads=1, block=block, **sizes)


def test_any_module_of_linear_layers_is_traced():
    groups = input_groups(custom(InTurn), "any")
    assert groups == (("used.0", "spare"), ("used.1",))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parameters(custom(InTurn).abstract_block("any")))
    inputs = capture_block(custom(InTurn), "any", params, jnp.ones((1, 2, 4)), ("used.1",))
    np.testing.assert_array_equal(inputs["used.1"], np.full((1, 2, 4), 5.0))


def test_layers_that_cannot_be_calibrated_stop_the_run():
    with pytest.raises(ValueError, match=r"\['spare'\] of the block are never called"):
        input_groups(custom(LeavesOneOut), "any")
    with pytest.raises(NotImplementedError, match=r"'used.0' is called twice"):
        input_groups(custom(CallsOneTwice), "any")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"shape \(3,\): pass \[batch, time\]"),
        (np.zeros((1, 3), np.float32), "tokens are float32: pass integers"),
        (np.zeros((1, 0), np.int32), "at least one"),
        ([[0, 96]], r"tokens span 0..96, but the vocabulary is 0..95"),
        ([[-1, 2]], r"tokens span -1..2"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        BIASED(tokens)


def test_a_model_can_be_jitted_and_replaced():
    tokens = decoder_cases.tokens("biases")
    assert np.allclose(jax.jit(BIASED.__call__)(tokens), BIASED(tokens), rtol=1e-4, atol=1e-4)
    shorter = replace(BIASED, params={**BIASED.params, "layers": BIASED.params["layers"][:1]})
    assert shorter(tokens).shape == (2, 32, 96)
