"""Configs of every family: older fields, defaults, and what is refused."""

import architecture_cases as cases
import numpy as np
import pytest

from gptq_jax.models.families.bloom import alibi_slopes
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.models.rope import Rope


def config(name, **changes):
    return {**cases.oracle(name)["config"], **changes}


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def test_older_configs_read_as_newer_ones():
    gemma3 = without(config("gemma3"), "rope_parameters", "layer_types", "_sliding_window_pattern")
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert architecture_from_config(gemma3 | older | scaling) == architecture_from_config(config("gemma3"))
    neox = without(config("gpt_neox"), "rope_parameters") | {"rotary_pct": 0.5, "rotary_emb_base": 10000}
    assert architecture_from_config(neox) == architecture_from_config(config("gpt_neox"))
    phi3 = config("phi3_long")
    rope = phi3.pop("rope_parameters")
    older = {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16}
    scaling = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    found = architecture_from_config(phi3 | older | {"rope_scaling": scaling})
    assert found == architecture_from_config(config("phi3_long"))
    bloom = without(config("bloom"), "hidden_size", "n_head") | {"n_embed": 36, "num_attention_heads": 6}
    assert architecture_from_config(bloom) == architecture_from_config(config("bloom"))


def test_early_gemmas_call_their_activation_otherwise():
    legacy = architecture_from_config(config("gemma", hidden_act="gelu"))
    assert legacy.hidden_act == "gelu_pytorch_tanh"
    assert legacy == architecture_from_config(config("gemma"))


def test_null_is_not_absent():
    assert architecture_from_config(config("gemma2", attn_logit_softcapping=None)).scores.softcap is None
    assert architecture_from_config(without(config("gemma2"), "attn_logit_softcapping")).scores.softcap == 50.0


def test_layers_that_are_all_alike_are_of_one_kind():
    full = architecture_from_config(config("gemma3", layer_types=["full_attention"] * 4))
    assert (full.layer_kinds, full.sliding_window, full.rope.theta) == ((), None, 1e6)
    local = architecture_from_config(config("gemma3", layer_types=["sliding_attention"] * 4))
    assert (local.layer_kinds, local.sliding_window, local.rope) == ((), 6, Rope(theta=1e4))
    assert architecture_from_config(config("qwen2", max_window_layers=0)).sliding_window is None


def test_a_language_model_among_others():
    found = architecture_from_config({"model_type": "gemma3", "text_config": config("gemma3"), "vision_config": {}})
    assert found == architecture_from_config(config("gemma3"))


@pytest.mark.parametrize("heads", [1, 4, 6, 16, 20, 112])
def test_slopes_of_alibi(heads):
    """As the paper has them: of the power of two below, then of twice as many heads every second one."""
    below = 1 << (heads.bit_length() - 1)
    whole, between = 0.5 ** (8 / below * np.arange(1, below + 1)), 0.5 ** (4 / below * np.arange(1, 2 * below, 2))
    np.testing.assert_allclose(alibi_slopes(heads), np.concatenate([whole, between])[:heads], rtol=1e-12)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (config("opt", activation_function="mish"), "hidden_act='mish' is not supported: use one of"),
        (config("opt", layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine=False is not supported"),
        (config("gpt_neo", num_layers=None, num_heads=None), "this gpt_neo model lacks num_layers, num_heads"),
        (config("gpt2", n_embd="wide"), "n_embd='wide' is not an integer"),
        (config("gpt2", n_head=5), "n_embd=32 is no multiple of n_head=5"),
        (config("gpt2", add_cross_attention=True), "add_cross_attention=True is not supported: only False is"),
        (config("gpt_neo", attention_types="local"), "attention_types='local' is not a list"),
        (config("gpt_neo", attention_types=[["global", 3]]), "attention_types"),
        (config("gpt_neo", attention_types=[[["global"], 3]]), "names 3 layers, but num_layers is 4"),
        (config("gpt_neo", attention_types=[[["strided"], 4]]), r"holds \['strided'\]: only \['global', 'local'\]"),
        (config("gptj", rotary_dim=0), "rotary_dim=0 must be positive and at most the 8 of a head"),
        (config("gptj", rotary_dim=3), "turns pairs of the 3 values it rotates"),
        (config("gptj", tie_word_embeddings=True), "tie_word_embeddings=True is not supported"),
        (config("bloom", apply_residual_connection_post_layernorm=True), "post_layernorm=True is not supported"),
        (config("gemma", use_bidirectional_attention=True), "use_bidirectional_attention=True is not supported"),
        (config("gemma2", layer_types=["chunked_attention"] * 3), r"layer_types holds \['chunked_attention'\]"),
        (config("gemma2", layer_types=["full_attention", "sliding_attention"]), "2 layer_kinds for 3 layers"),
        (config("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar=0 must be positive"),
        (config("gemma2", final_logit_softcapping=-1.0), "final_logit_softcapping=-1.0 must be positive, or null"),
        (config("gemma3", rope_parameters={"full_attention": 3}), "rope_parameters.full_attention=3 is not an object"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config=3 is not an object"),
        (config("phi3", rope_parameters={"type": "ntk"}), "rope type 'ntk' is not supported"),
        (config("phi3", rope_parameters={**config("phi3_long")["rope_parameters"]}, hidden_size=64), "3 factors, but"),
        (config("phi3_long", rope_parameters={"short_factor": [1, "x", 2]}), "short_factor=.*not a list of finite"),
        (config("gpt_neox", rotary_pct=1.5, rope_parameters={}), "partial_rotary_factor=1.5 must be above 0"),
        (config("qwen3", rope_parameters={"rope_type": "mrope"}), "rope type 'mrope' is not supported"),
    ],
)
def test_what_is_not_supported_is_said(found, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_config(found)
