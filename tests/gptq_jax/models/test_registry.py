import decoder_cases
import pytest

from gptq_jax.models.registry import architecture_from_config
from gptq_jax.models.rope import Rope

TINY = decoder_cases.CASES["tied_gqa"]
LLAMA3 = decoder_cases.CASES["llama3_rope"]


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def test_old_and_new_rope_fields_read_alike():
    new = architecture_from_config(LLAMA3)
    scaling = without(LLAMA3["rope_parameters"], "rope_theta")
    old = without(LLAMA3, "rope_parameters") | {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert architecture_from_config(old) == new
    oldest = old | {"rope_scaling": {**without(scaling, "rope_type"), "type": "llama3"}}
    assert architecture_from_config(oldest) == new
    assert new.rope.theta == 500000.0
    assert new.rope.kind == "llama3"


def test_defaults_are_those_of_transformers():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    least = {name: TINY[name] for name in needed} | {"hidden_size": 64, "num_attention_heads": 8}
    llama = architecture_from_config({"model_type": "llama", **least})
    assert (llama.num_kv_heads, llama.head_dim, llama.context_length) == (8, 8, 2048)
    assert (llama.sliding_window, llama.tie_embeddings, llama.norm_eps) == (None, False, 1e-6)
    assert llama.rope == Rope(theta=10000.0)
    mistral = architecture_from_config({"model_type": "mistral", **least, "num_attention_heads": 16})
    assert (mistral.num_kv_heads, mistral.context_length, mistral.sliding_window) == (8, 131072, 4096)


def test_a_family_ignores_what_transformers_ignores():
    assert architecture_from_config({**TINY, "sliding_window": 7}).sliding_window is None
    mistral = {**decoder_cases.CASES["mistral_full"], "attention_bias": True, "mlp_bias": True}
    assert not architecture_from_config(mistral).attention_bias
    assert not architecture_from_config(mistral).mlp_bias


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "model_type": "bert"}, r"'bert' is not supported: use one of \['bloom', .*'llama', 'mistral', "),
        (without(TINY, "model_type"), "'None' is not supported"),
        (without(TINY, "vocab_size", "hidden_size"), "lacks vocab_size, hidden_size"),
        ({**TINY, "rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        ({**TINY, "rope_parameters": {"rope_type": "longrope"}}, "'longrope' needs short_factor, long_factor"),
        ({**TINY, "rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({**TINY, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**TINY, "hidden_act": "mish"}, "hidden_act='mish'"),
        ({**TINY, "num_attention_heads": 5}, "hidden_size=48 is no multiple of num_attention_heads=5"),
    ],
)
def test_what_is_not_supported_is_said(config, message):
    with pytest.raises(ValueError, match=message):
        architecture_from_config(config)
