"""What a harness asks, as tokens: where contexts end, what is cut off, what runs together; no model and no harness."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

LEAST_LENGTH = 32  # tokens of the shortest padded row

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Scored:
    """Tokens whose log-likelihood is asked for, after others that are given.

    Attributes:
        context: at least one token.
        continuation: each token is predicted from all that come before it.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all tokens but the last."""
        return (*self.context, *self.continuation)[:-1]


def split_pair(context: str, continuation: str, encode: Encode, encode_bare: Encode, prefix: int) -> Scored:
    """The tokens of a context and of what follows it.

    Both are encoded as one text, which is cut where the context's own tokens end; spaces at the end of the context
    go with the continuation, as tokenizers put them into the next word. This is the harness's protocol
    (lm_eval.api.model.TemplateLM).

    Args:
        context: may be empty: then the continuation follows `prefix` alone.
        continuation: a text that is not empty.
        encode: text -> tokens, with the special tokens that start a text.
        encode_bare: text -> tokens, without.
        prefix: the token that stands for the start of a text.

    Raises:
        ValueError: the continuation has no tokens.
    """
    if not context:
        tokens = encode_bare(continuation)
        start = [] if tokens[:1] == [prefix] else [prefix]
        return _scored([*start, *tokens], 1, continuation)
    kept = context.rstrip()
    if not kept:  # nothing but spaces: they are the continuation's, and something must stand before them
        return split_pair("", context + continuation, encode, encode_bare, prefix)
    whole = encode(kept + (context[len(kept) :] + continuation))
    return _scored(whole, len(encode(kept)), continuation)


def truncate(request: Scored, context_length: int) -> Scored:
    """The request with so much taken from the left that its inputs fit the model's context.

    Raises:
        ValueError: the continuation alone is longer than the context.
    """
    if len(request.continuation) > context_length:
        raise ValueError(
            f"a continuation of {len(request.continuation)} tokens is longer than the model's context of "
            f"{context_length}: it cannot be scored whole."
        )
    keep = context_length + 1 - len(request.continuation)
    return Scored(request.context[-keep:], request.continuation)


def rolling_windows(tokens: Sequence[int], prefix: int, context_length: int) -> Iterator[Scored]:
    """Windows in which every token of a text is predicted once, the later ones with as much context as fits.

    The first predicts its tokens after `prefix`; the others do not overlap in what they predict; the last is filled up
    with context from before.

    Args:
        tokens: of the text.
        prefix: stands for the start of a text.
        context_length: tokens that the model reads at most.
    """
    tokens = tuple(tokens)
    for start in range(0, len(tokens), context_length):
        part = tokens[start : start + context_length]
        before = tokens[max(0, start + len(part) - context_length - 1) : start] if start else (prefix,)
        yield Scored(before, part)


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: their places in what was asked.
        length: that all are padded to.
    """

    rows: tuple[int, ...]
    length: int


def batches_by_length(lengths: Sequence[int], batch_size: int, context_length: int) -> list[Batch]:
    """Rows of like length together, longest first; padded lengths are powers of two, so that few shapes compile.

    Between powers of two there is one more, half-way: no row is padded by more than half of it, or to `LEAST_LENGTH`.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch; the last of a length may have fewer.
        context_length: no row is padded beyond it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(min(padded_length(length), context_length), []).append(row)
    found = []
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        found += [Batch(tuple(rows[start : start + batch_size]), length) for start in range(0, len(rows), batch_size)]
    return found


def padded_length(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, ... that holds `length`."""
    power = max(LEAST_LENGTH, 1 << max(length - 1, 0).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > LEAST_LENGTH else power


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` that is in it; empty ones are none."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def _scored(tokens: Sequence[int], boundary: int, continuation: str) -> Scored:
    if not tokens[boundary:]:
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own to score.")
    return Scored(tuple(tokens[:boundary]), tuple(tokens[boundary:]))
