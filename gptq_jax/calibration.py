"""Text to token batches: data sets by name or local files, the same every time for the same seed."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int32, Shaped

SPLITS = ("train", "validation", "test")
# The reader of `datasets` for each file suffix; plain text needs none.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SUFFIXES = (".txt", *READERS)
TEXT_COLUMN = "text"


class Batch(NamedTuple):
    """Token rows and, where rows are padded, which tokens are text."""

    tokens: Int32[np.ndarray | Array, "batch time"]
    mask: Bool[np.ndarray | Array, "batch time"] | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set of the Hugging Face Hub, as the GPTQ paper reads it.

    Source: github.com/IST-DASLab/gptq, datautils.py.

    Attributes:
        path: its Hub id.
        column: the column with the text.
        joint: what goes between rows.
        files: the file of each split, where not all files are wanted.
        name: the configuration.
        revision: the branch, where it is not the main one.
        aliases: splits that stand for another.
        rows: how many rows of a split are read, None for all.
    """

    path: str
    column: str = TEXT_COLUMN
    joint: str
    files: dict[str, str] | None = None
    name: str | None = None
    revision: str | None = None
    aliases: dict[str, str] | None = None
    rows: int | None = None


CORPORA = {
    "wikitext2": Corpus(path="Salesforce/wikitext", name="wikitext-2-raw-v1", joint="\n\n"),
    "ptb": Corpus(
        # The original is a script, which `datasets` no longer runs; this branch holds its output.
        path="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in SPLITS},
        column="sentence",
        joint=" ",
    ),
    "c4": Corpus(
        path="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        aliases={"test": "validation"},
        joint=" ",
        rows=5000,
    ),
}


def read_text(source: str, *, split: str = "train") -> str:
    """Read all text of a data set or a local file.

    Args:
        source: wikitext2, c4 (the first 5000 documents of a split's first shard) or ptb, read from the
            Hugging Face Hub; or a .txt, .jsonl, .json or .parquet file, the last three with a column "text"
            whose rows are joined by a blank line.
        split: train, validation or test of a named data set (c4's test is its validation); ignored for files.

    Raises:
        ValueError: the split or the file's content cannot be used.
        FileNotFoundError: there is no such file or data set.
        ConnectionError: the Hub cannot be reached.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if source in CORPORA:
        text = _read_corpus(source, CORPORA[source], split)
    else:
        text = _read_file(Path(source))
    if not text.strip():
        raise ValueError(f"{source} holds no text.")
    return text


def token_stream(text: str, tokenizer: Any) -> Int32[np.ndarray, "tokens"]:
    """Tokenize a whole text as one sequence, with the special tokens the tokenizer adds to a sequence.

    Raises:
        ValueError: the tokenizer has no vocabulary or gives no tokens.
    """
    _check_tokenizer(tokenizer)
    # verbose=False: a stream is longer than any model's context, which is no reason to warn.
    tokens = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)
    if tokens.size == 0:
        raise ValueError("the text gives no tokens: is it empty?")
    return tokens


def sample_windows(
    stream: Int32[np.ndarray, "tokens"], *, samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Cut `samples` windows of `length` tokens at uniformly random starts (they may overlap).

    Raises:
        ValueError: an argument is not positive, or the stream is shorter than one window.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive.")
    if stream.size < length:
        raise ValueError(
            f"the calibration text has {stream.size} tokens, fewer than one window of {length}: "
            f"give a longer text or --length {stream.size} or less."
        )
    starts = np.random.default_rng(seed).integers(0, stream.size - length + 1, size=samples)
    return stream[starts[:, None] + np.arange(length)]


def batches(tokens: Shaped[np.ndarray, "samples length"], batch_size: int) -> list[Shaped[np.ndarray, "batch length"]]:
    """Split rows into batches of `batch_size`; the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive.")
    return [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]


def calibration_batches(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    batch_size: int = 1,
    split: str = "train",
) -> list[Int32[np.ndarray, "batch length"]]:
    """Random windows of a data set or file (`read_text`), in batches; the same for the same seed."""
    stream = token_stream(read_text(source, split=split), tokenizer)
    return batches(sample_windows(stream, samples=samples, length=length, seed=seed), batch_size)


def from_texts(texts: Sequence[str], tokenizer: Any, length: int) -> Batch:
    """Tokenize short texts into rows of `length`: longer ones are cut, shorter ones padded on the right.

    The mask is False at padding, which must not enter a Hessian.

    Raises:
        ValueError: there are no texts, or one gives no tokens.
    """
    _check_tokenizer(tokenizer)
    if length < 1:
        raise ValueError(f"length={length} must be positive.")
    if not texts:
        raise ValueError("texts is empty: give at least one text.")
    padding = tokenizer.pad_token_id or 0
    tokens = np.full((len(texts), length), padding, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = tokenizer(text, verbose=False)["input_ids"][:length]
        if not ids:
            raise ValueError(f"text {row} of {len(texts)} gives no tokens: is it empty?")
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return Batch(tokens, mask)


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None or len(tokenizer) == 0:
        raise ValueError("the model has no tokenizer vocabulary: add tokenizer.json to its directory.")


def _read_corpus(source: str, corpus: Corpus, split: str) -> str:
    from datasets import load_dataset

    split = (corpus.aliases or {}).get(split, split)
    files = corpus.files and {split: corpus.files[split]}
    try:
        rows = load_dataset(
            corpus.path, corpus.name, data_files=files, revision=corpus.revision, split=split, streaming=True
        )
        return corpus.joint.join(row[corpus.column] for row in (rows.take(corpus.rows) if corpus.rows else rows))
    except OSError as error:
        raise ConnectionError(
            f"{source} is read from the Hugging Face Hub, which gave: {_first_line(error)}; "
            f"a local file of type {', '.join(SUFFIXES)} needs no network."
        ) from error


def _read_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        known = f"{', '.join(CORPORA)}, or a file of type {', '.join(SUFFIXES)}"
        raise FileNotFoundError(f"{path} {problem}: give {known}.")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} cannot be read: give a file of type {', '.join(SUFFIXES)}.")
    try:
        if suffix == ".txt" or path.stat().st_size == 0:
            return path.read_text(encoding="utf-8")
        rows = _read_rows(path, READERS[suffix])
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from None
    return "\n\n".join(_texts(path, rows))


def _read_rows(path: Path, reader: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    # Escaped because `datasets` takes a path for a pattern; streamed because it would cache a copy otherwise.
    files = {"train": glob.escape(str(path.absolute()))}
    try:
        return list(load_dataset(reader, data_files=files, split="train", streaming=True))
    except UnicodeDecodeError:
        raise
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _texts(path: Path, rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for number, row in enumerate(rows):
        if TEXT_COLUMN not in row:
            raise ValueError(f'{path} has no column "text"; its columns are {", ".join(map(repr, row))}.')
        if not isinstance(row[TEXT_COLUMN], str):
            raise ValueError(f'{path}: "text" of row {number} is {row[TEXT_COLUMN]!r}, not a string.')
        yield row[TEXT_COLUMN]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
