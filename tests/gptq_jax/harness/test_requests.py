"""What the harness's protocol makes of texts and tokens, without the harness."""

import numpy as np
import pytest
from decoder_models import build, byte_tokenizer
from scipy.special import log_softmax
from tiny_quantization import CONFIG

from gptq_jax.harness.requests import (
    Scored,
    batches_by_length,
    cut_at,
    padded_length,
    rolling_windows,
    split_pair,
    truncate,
)
from gptq_jax.harness.scoring import score

PREFIX = 0


def words(text):
    """A tokenizer that reads a word with the space before it as one, and starts texts with 1."""
    return [1, *bare(text)]


def bare(text):
    return [ord(word.strip()[0]) if word.strip() else 7 for word in text.replace(" ", "| ").split("|") if word]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("a b", " c d", Scored((1, ord("a"), ord("b")), (ord("c"), ord("d")))),
        ("a b ", "c d", Scored((1, ord("a"), ord("b")), (ord("c"), ord("d")))),  # the space is the continuation's
        ("", "c d", Scored((PREFIX,), (ord("c"), ord("d")))),
        (" ", "c", Scored((PREFIX,), (ord("c"),))),
    ],
)
def test_where_a_context_ends(context, continuation, expected):
    assert split_pair(context, continuation, words, bare, PREFIX) == expected


def test_a_text_that_begins_with_the_prefix_is_not_given_another():
    assert split_pair("", "x y", words, bare, ord("x")) == Scored((ord("x"),), (ord("y"),))


def test_a_continuation_that_melts_into_the_context_is_refused():
    def pairs(text):  # tokens of two letters
        return [ord(text[place]) for place in range(0, len(text), 2)]

    with pytest.raises(ValueError, match="'b' has no tokens of its own"):
        split_pair("a", "b", pairs, pairs, PREFIX)


def test_real_tokenizers_give_back_the_whole_text():
    tokenizer = byte_tokenizer()
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    for context, continuation in (("the quick ", "brown fox"), ("äö", "ü 世界"), ("jumps over", " the lazy")):
        found = split_pair(context, continuation, encode, encode, PREFIX)
        assert [*found.context, *found.continuation] == encode(context + continuation)
        assert len(found.context) == len(encode(context.rstrip()))


def test_long_contexts_lose_their_start():
    request = Scored(tuple(range(10)), (90, 91))
    assert truncate(request, 11) == request  # the last token is not read
    assert truncate(request, 5) == Scored((6, 7, 8, 9), (90, 91))
    assert len(truncate(request, 5).inputs) == 5
    with pytest.raises(ValueError, match="a continuation of 2 tokens is longer than the model's context of 1"):
        truncate(request, 1)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 10])
def test_rolling_windows_predict_every_token_once(count):
    tokens = list(range(100, 100 + count))
    windows = list(rolling_windows(tokens, PREFIX, 4))
    assert [token for window in windows for token in window.continuation] == tokens
    assert windows[0].context == (PREFIX,)
    for window in windows[1:]:
        assert len(window.inputs) == 4  # the whole context is used
        whole = [*window.context, *window.continuation]
        assert whole == tokens[whole[0] - 100 :][: len(whole)]


def test_the_example_of_the_harness():
    # lm_eval.api.model.LM.loglikelihood_rolling, context 4: inputs and what is predicted.
    found = [(window.inputs, window.continuation) for window in rolling_windows(range(10), -1, 4)]
    assert found == [((-1, 0, 1, 2), (0, 1, 2, 3)), ((3, 4, 5, 6), (4, 5, 6, 7)), ((5, 6, 7, 8), (8, 9))]


def test_few_shapes_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 2000, 500).tolist()
    batches = batches_by_length(lengths, 8, 2048)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(500))
    assert len({batch.length for batch in batches}) <= 13  # 32 to 2048 and those half-way
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)
    for batch in batches:
        assert 1 <= len(batch.rows) <= 8
        for row in batch.rows:
            assert lengths[row] <= batch.length <= max(32, 1.5 * lengths[row])
    assert [padded_length(n) for n in (0, 1, 32, 33, 48, 49, 65, 97)] == [32, 32, 32, 48, 48, 64, 96, 128]
    assert {batch.length for batch in batches_by_length([70, 100], 1, 100)} == {96, 100}
    with pytest.raises(ValueError, match="batch_size=0"):
        batches_by_length([1], 0, 8)


def test_texts_end_before_the_first_stop():
    assert cut_at("one. two! three", ["!", ". ", ""]) == "one"
    assert cut_at("nothing", ["\n"]) == "nothing"
    assert cut_at("nothing", []) == "nothing"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_the_definition(batch_size):
    model = build(CONFIG)
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (5, 3), (40, 1), (2, 30), (126, 2), (140, 7)]
    requests = [Scored(*(tuple(rng.integers(0, 96, n).tolist()) for n in size)) for size in sizes]
    # One whose continuation is what the model finds likeliest.
    likeliest = int(np.asarray(model(np.array([requests[1].context])))[0, -1].argmax())
    requests.append(Scored(requests[1].context, (likeliest,)))
    found = {row: (value, greedy) for row, value, greedy in score(model, requests, batch_size=batch_size)}
    assert sorted(found) == list(range(7))
    for row, request in enumerate(requests):
        tokens = np.array([*request.context, *request.continuation])[-129:]
        count = len(request.continuation)
        log_p = log_softmax(np.asarray(model(tokens[None, :-1]), np.float64)[0], axis=-1)[-count:]
        assert found[row][0] == pytest.approx(log_p[np.arange(count), tokens[-count:]].sum(), rel=1e-4, abs=1e-5)
        assert found[row][1] == (log_p.argmax(-1) == tokens[-count:]).all()
    assert found[6][1] is True


def test_without_the_harness_the_remedy_is_told(monkeypatch):
    import sys

    from gptq_jax.harness.run import run_tasks

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'gptq-jax\[eval\]'"):
        run_tasks("nowhere", ["arithmetic"])
