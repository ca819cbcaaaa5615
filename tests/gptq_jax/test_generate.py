import importlib
from collections import Counter
from dataclasses import replace

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import TEXT, build, byte_tokenizer

from gptq_jax.generate import Sampling, end_tokens, generate, generate_tokens, stream
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models import base
from gptq_jax.spec import QuantSpec

module = importlib.import_module("gptq_jax.generate")  # the package has a function of this name
LONG = {**decoder_cases.CASES["head_dim"], "max_position_embeddings": 512}
MODEL = build(LONG)
WINDOWED = build({**decoder_cases.CASES["mistral_window"], "max_position_embeddings": 512})
TEXT_MODEL = build({**LONG, "vocab_size": 300}, tokenizer=byte_tokenizer())


def prompt(length):
    return np.random.default_rng(length).integers(0, 96, length)


def recomputed(model, tokens, count):
    """Greedy tokens from the whole sequence each time, padded at the end to one shape."""
    tokens = list(tokens)
    size = len(tokens) + count
    for _ in range(count):
        logits = model(np.array([tokens + [0] * (size - len(tokens))]))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_greedy_tokens_are_those_without_a_cache(model, length):
    found = list(generate_tokens(model, prompt(length), max_new_tokens=12, stop_tokens=()))
    assert found == recomputed(model, prompt(length), 12)
    assert len(set(found)) > 2


def test_a_cache_is_outgrown_correctly():
    found = list(generate_tokens(MODEL, prompt(250), max_new_tokens=10, stop_tokens=()))  # capacity 512
    assert found == recomputed(MODEL, prompt(250), 10)
    assert len(list(generate_tokens(MODEL, prompt(500), max_new_tokens=12, stop_tokens=()))) == 12


def test_nothing_is_compiled_for_another_prompt_or_token():
    functions = (base._embed, base._run_block, module._draw)
    list(generate_tokens(MODEL, prompt(5), max_new_tokens=3, stop_tokens=()))
    before = [function._cache_size() for function in functions]
    for length, count in ((1, 1), (64, 2), (70, 40), (200, 9)):
        list(generate_tokens(MODEL, prompt(length), max_new_tokens=count, stop_tokens=()))
    assert [function._cache_size() for function in functions] == before


def test_quantized_kernels_generate_what_their_float_values_do():
    spec = QuantSpec(bits=4, group_size=16)
    packed, dense = [], []
    for block in MODEL.params["layers"]:
        kernels = {
            (part, name): round_to_nearest(layer["kernel"], spec)
            for part in ("self_attn", "mlp")
            for name, layer in block[part].items()
        }
        for target, convert in ((packed, lambda tensor: tensor), (dense, lambda tensor: tensor.dequantize())):
            new = {part: dict(block[part]) for part in ("self_attn", "mlp")}
            for (part, name), tensor in kernels.items():
                new[part][name] = {**block[part][name], "kernel": convert(tensor)}
            target.append({**block, **new})

    def tokens(layers):
        model = replace(MODEL, params={**MODEL.params, "layers": layers})
        return list(generate_tokens(model, prompt(10), max_new_tokens=20, stop_tokens=()))

    assert tokens(packed) == tokens(dense) != tokens(MODEL.params["layers"])


def drawn(count=400, **options):
    """The token drawn for each of many positions, and the logits that all of them are drawn from."""
    sampling = Sampling(**options)
    config, reads = MODEL.config, base.head_params(MODEL.config, MODEL.params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 48)), jnp.float32)
    logits = np.asarray(base.apply_head(config, reads, x), np.float64)[0, 0] / sampling.temperature
    draw = jax.vmap(
        lambda position: module._draw(
            config,
            True,
            sampling.top_k,
            sampling.top_p is not None,
            reads,
            jax.random.key(sampling.seed),
            jnp.float32(sampling.temperature),
            jnp.float32(sampling.top_p or 1),
            x,
            jnp.int32(0),
            position,
        )[0, 0]
    )
    weights = np.exp(logits - logits.max())
    return Counter(np.asarray(draw(jnp.arange(count, dtype=jnp.int32))).tolist()), weights / weights.sum()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.7}, {"top_p": 1e-6}, {"top_k": 1}]
)
def test_draws_follow_the_distribution(options):
    counts, p = drawn(4000, temperature=5.0, **options)
    order = np.argsort(-p)[: options.get("top_k", len(p))]
    share = p[order] / p[order].sum()
    kept = int(np.searchsorted(np.cumsum(share), options.get("top_p", 1.0)) + 1)
    order, share = order[:kept], share[:kept] / share[:kept].sum()
    assert set(counts) <= set(order.tolist())
    found = np.array([counts[token] for token in order.tolist()]) / 4000
    assert np.abs(found - share).max() < 0.04


def test_the_seed_decides():
    def draw(seed):
        options = Sampling(temperature=1.5, seed=seed)
        return list(generate_tokens(MODEL, prompt(6), max_new_tokens=30, sampling=options, stop_tokens=()))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_it_stops_before_a_stop_token():
    tokens = list(generate_tokens(MODEL, prompt(9), max_new_tokens=20, stop_tokens=()))
    stop = tokens[-1]
    expected = tokens[: tokens.index(stop)]
    assert list(generate_tokens(MODEL, prompt(9), max_new_tokens=20, stop_tokens=[stop])) == expected
    named = replace(MODEL, source={"eos_token_id": [stop, 95]})
    assert list(generate_tokens(named, prompt(9), max_new_tokens=20)) == expected


def test_end_tokens_come_from_config_and_tokenizer():
    assert end_tokens(MODEL) == frozenset()
    assert end_tokens(replace(MODEL, source={"eos_token_id": 7})) == {7}
    assert end_tokens(replace(TEXT_MODEL, source={"eos_token_id": [7, 9]})) == {7, 9, 0}


def test_text_comes_in_pieces():
    pieces = []
    text = generate(TEXT_MODEL, "the quick", max_new_tokens=24, stop_tokens=(), on_text=pieces.append)
    assert text == "".join(pieces)
    tokens = byte_tokenizer()("the quick")["input_ids"]
    assert text == "".join(stream(TEXT_MODEL, tokens, max_new_tokens=24, stop_tokens=()))
    assert len(pieces) > 1


def test_characters_of_several_bytes_come_whole():
    tokenizer = byte_tokenizer()
    tokens = tokenizer(TEXT)["input_ids"]
    pieces = list(module._decode(tokenizer, tokens[:3], iter(tokens[3:])))
    assert "".join(pieces) == TEXT.removeprefix(tokenizer.decode(tokens[:3]))
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20


def test_chat_fills_in_the_template():
    expected = byte_tokenizer()("[user] hello [reply]")["input_ids"]
    found = generate(TEXT_MODEL, "hello", chat=True, max_new_tokens=8, stop_tokens=())
    assert found == generate(TEXT_MODEL, expected, max_new_tokens=8, stop_tokens=())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("hi", {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ("hi", {"temperature": -0.5}, "temperature=-0.5"),
        ("hi", {"temperature": float("nan")}, "temperature=nan"),
        ("hi", {"top_k": 0}, "top_k=0"),
        ("hi", {"top_p": 0.0}, "top_p=0.0"),
        ("hi", {"top_p": 1.5}, "top_p=1.5"),
        ("hi", {"seed": -1}, "seed=-1"),
        ("", {}, "the prompt has no tokens"),
        ("hi", {"max_new_tokens": 512}, "exceed the model's context of 512"),
        ([[1, 2]], {}, r"shape \(1, 2\): pass the tokens"),
        ([1, 300], {}, "but the vocabulary is 0..299"),
        ([1, 2], {"chat": True}, "chat=True needs the prompt as text"),
    ],
)
def test_bad_arguments_are_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        generate(TEXT_MODEL, text, **options)


def test_streaming_refuses_at_once_not_at_the_first_piece():
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        stream(TEXT_MODEL, "hi", max_new_tokens=0)


def test_what_a_model_lacks_is_said():
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(MODEL, "hi")
    bare = byte_tokenizer(301)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate(replace(TEXT_MODEL, tokenizer=bare), "hi", chat=True)
