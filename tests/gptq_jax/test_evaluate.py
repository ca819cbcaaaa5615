from dataclasses import replace

import decoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import TEXT, build, byte_tokenizer
from scipy.special import log_softmax

from gptq_jax import evaluate
from gptq_jax.evaluate import compare, perplexity

TINY = decoder_cases.CASES["tied_gqa"]
MODEL = build(TINY)
OTHER = build(decoder_cases.CASES["untied_mha"], seed=3)
TOKENS = np.random.default_rng(5).integers(0, 96, 83).astype(np.int32)


def log_probabilities(model, length):
    """Of the predicted tokens' whole distributions, in float64, [windows, length - 1, vocab]; and the tokens."""
    windows = TOKENS[: len(TOKENS) // length * length].reshape(-1, length)
    return log_softmax(np.asarray(model(windows), np.float64)[:, :-1], axis=-1), windows[:, 1:, None]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
@pytest.mark.parametrize("length", [2, 20, 83])
def test_perplexity_is_the_definition(length, batch_size):
    log_p, targets = log_probabilities(MODEL, length)
    expected = np.exp(-np.take_along_axis(log_p, targets, -1).mean())
    assert perplexity(MODEL, TOKENS, length=length, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_comparison_is_the_definition(batch_size):
    log_q, targets = log_probabilities(MODEL, 20)
    log_p, _ = log_probabilities(OTHER, 20)
    found = compare(MODEL, OTHER, TOKENS, length=20, batch_size=batch_size)
    assert found.perplexity == pytest.approx(np.exp(-np.take_along_axis(log_q, targets, -1).mean()), rel=1e-5)
    assert found.other_perplexity == pytest.approx(np.exp(-np.take_along_axis(log_p, targets, -1).mean()), rel=1e-5)
    assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean(), abs=1e-6)


def test_a_model_agrees_with_itself():
    found = compare(MODEL, MODEL, TOKENS, length=20)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.other_perplexity == perplexity(MODEL, TOKENS, length=20)


def test_pieces_of_logits_change_nothing(monkeypatch):
    before = perplexity(MODEL, TOKENS, length=20, batch_size=3)
    jax.clear_caches()
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", 96 * 7)
    assert perplexity(MODEL, TOKENS, length=20, batch_size=3) == pytest.approx(before, rel=1e-6)
    jax.clear_caches()


def test_the_logits_of_a_batch_never_exist_whole():
    vocab, shape = 50000, (4, 512)
    model = build({**TINY, "vocab_size": vocab, "num_hidden_layers": 1})
    x, tokens = jax.ShapeDtypeStruct((*shape, 48), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    lowered = evaluate._losses.lower(model.config, evaluate.head_params(model.config, model.params), x, tokens)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 512 * vocab * 4 / 2


def test_a_text_is_read_by_the_tokenizer():
    model = build({**TINY, "vocab_size": 300}, tokenizer=byte_tokenizer())
    tokens = byte_tokenizer()(TEXT)["input_ids"]
    assert perplexity(model, TEXT, length=30) == perplexity(model, tokens, length=30)


def test_progress_goes_to_stderr(capsys):
    perplexity(MODEL, TOKENS, length=20, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "perplexity" in shown.err


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS, {"length": 84}, "the text has 83 tokens, less than one window"),
        (TOKENS, {"length": 129}, "length=129 is more than the model's context_length=128"),
        (TOKENS, {"length": 1}, "length=1 must be at least 2"),
        (TOKENS, {"length": 8, "batch_size": 0}, "batch_size=0"),
        (TOKENS[None], {"length": 8}, r"shape \(1, 83\): pass one stream"),
        (TOKENS + 50, {"length": 8}, "but the vocabulary is 0..95"),
        ("some text", {"length": 8}, "no tokenizer"),
    ],
)
def test_bad_arguments_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, tokens, **options)


def test_other_vocabularies_and_shorter_contexts_are_refused():
    with pytest.raises(ValueError, match="hold 96 and 300 tokens"):
        compare(MODEL, build({**TINY, "vocab_size": 300}), TOKENS, length=8)
    with pytest.raises(ValueError, match="context_length=16"):
        compare(MODEL, build({**TINY, "max_position_embeddings": 16}), TOKENS, length=20)


def test_logits_that_are_not_finite_are_an_error():
    embedding = MODEL.params["embed"]["embedding"].at[int(TOKENS[45])].set(jnp.nan)
    broken = replace(MODEL, params={**MODEL.params, "embed": {"embedding": embedding}})
    with pytest.raises(ValueError, match=r"the model's logits are not finite in window"):
        perplexity(broken, TOKENS, length=20)
    with pytest.raises(ValueError, match=r"the other model's logits are not finite"):
        compare(MODEL, broken, TOKENS, length=20)
