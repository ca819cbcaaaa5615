import numpy as np
import pytest
from gguf_files import byte_vocabulary

from gptq_jax import calibration
from gptq_jax.calibration import (
    batches,
    calibration_batches,
    from_texts,
    read_text,
    sample_windows,
    token_stream,
)
from gptq_jax.storage.tokenizer import gguf_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return gguf_tokenizer(tmp_path_factory.mktemp("t"), byte_vocabulary(["a b"]), context_length=8)


def test_text_files_are_one_document(tmp_path):
    path = tmp_path / "odd [name] *.txt"
    path.write_text("one\ntwo\n\n\nünï\n", encoding="utf-8")
    assert read_text(str(path)) == "one\ntwo\n\n\nünï\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_are_joined_by_a_blank_line(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text('{"text": "a", "id": 1}\n{"text": "b\\nc", "id": 2}\n')
    elif suffix == ".json":
        path.write_text('[{"text": "a"}, {"text": "b\\nc"}]')
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b\nc"], "id": [1, 2]}), path)
    assert read_text(str(path)) == "a\n\nb\nc"


def test_reading_leaves_no_cache(tmp_path, monkeypatch):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    read_text(str(path))
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "has no column \"text\"; its columns are 'body', 'id'"),
        ("a.jsonl", b'{"text": 3}\n', '"text" of row 0 is 3, not a string'),
        ("a.jsonl", b'{"text": "x"\n oops', "cannot be read"),
        ("a.parquet", b"not parquet at all", "cannot be read"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.csv", b"text\nx", r"give a file of type \.txt, \.jsonl, \.json, \.parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_text(str(tmp_path / name))


def test_unknown_source_and_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="wikitext does not exist: give wikitext2, ptb, c4, or a file"):
        read_text("wikitext")
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test"):
        read_text("wikitext2", split="dev")


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "r0\n\nr1")),
        (
            "ptb",
            "test",
            ("ptb-text-only/ptb_text_only", None, "penn_treebank/test/0000.parquet", "test", "r0 r1"),
        ),
        ("c4", "train", ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train", "r0 r1")),
        (
            "c4",
            "test",
            ("allenai/c4", None, "en/c4-validation.00000-of-00008.json.gz", "validation", "r0 r1"),
        ),
    ],
)
def test_named_data_sets(monkeypatch, name, split, expected):
    import datasets

    path, config, file, stored_split, text = expected

    def load_dataset(asked_path, asked_config, *, data_files, revision, split, streaming):
        assert (asked_path, asked_config, split, streaming) == (path, config, stored_split, True)
        assert data_files == (file and {stored_split: file})
        column = "sentence" if name == "ptb" else "text"
        return datasets.Dataset.from_dict({column: ["r0", "r1"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(name, split=split) == text


def test_hub_cannot_be_reached(monkeypatch):
    import datasets

    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConnectionError, match=r"wikitext2 is read from the Hugging Face Hub.*a local file of type \.txt"
    ):
        read_text("wikitext2")


def test_token_stream_is_the_whole_text(tokenizer):
    text = "ab cd " * 50
    stream = token_stream(text, tokenizer)
    assert stream.dtype == np.int32
    assert tokenizer.decode(stream) == text
    with pytest.raises(ValueError, match="gives no tokens"):
        token_stream("", tokenizer)
    with pytest.raises(ValueError, match="no tokenizer vocabulary"):
        token_stream("a", None)


def test_windows_are_cut_from_the_stream_anywhere_in_it():
    stream = np.arange(100, dtype=np.int32)
    windows = sample_windows(stream, samples=2000, length=10, seed=3)
    assert windows.shape == (2000, 10)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(10))
    assert set(windows[:, 0].tolist()) == set(range(91))
    np.testing.assert_array_equal(windows, sample_windows(stream, samples=2000, length=10, seed=3))
    assert not np.array_equal(windows, sample_windows(stream, samples=2000, length=10, seed=4))
    np.testing.assert_array_equal(sample_windows(stream, samples=1, length=100, seed=0)[0], stream)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"length": 101}, r"has 100 tokens, fewer than one window of 101.*--length 100"),
        ({"length": 0}, "length=0 must be positive"),
        ({"samples": 0}, "samples=0 must be positive"),
    ],
)
def test_impossible_windows(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        sample_windows(np.arange(100, dtype=np.int32), **{"samples": 4, "length": 10, "seed": 0, **arguments})


def test_batches_keep_the_uneven_last_one():
    tokens = np.arange(35, dtype=np.int32).reshape(7, 5)
    parts = batches(tokens, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        batches(tokens, 0)


def test_calibration_batches_are_the_same_for_the_same_seed(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number}\n" for number in range(200)))
    options = {"samples": 5, "length": 16, "batch_size": 2}
    first, again, other = (calibration_batches(str(path), tokenizer, seed=seed, **options) for seed in (1, 1, 2))
    assert [batch.shape for batch in first] == [(2, 16), (2, 16), (1, 16)]
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(first, other, strict=True))
    assert tokenizer.decode(first[0][0]) in path.read_text()


def test_short_texts_are_padded_and_masked(tokenizer):
    batch = from_texts(["ab", "cdefghij", "x" * 30], tokenizer, 10)
    assert batch.tokens.shape == batch.mask.shape == (3, 10)
    assert batch.mask.sum(1).tolist() == [1, 8, 10]
    for row, text in enumerate(["ab", "cdefghij", "x" * 10]):
        assert tokenizer.decode(batch.tokens[row][batch.mask[row]]) == text
        assert not batch.mask[row, batch.mask[row].sum() :].any()


def test_texts_that_cannot_be_batched(tokenizer):
    with pytest.raises(ValueError, match="texts is empty"):
        from_texts([], tokenizer, 4)
    with pytest.raises(ValueError, match="text 1 of 2 gives no tokens"):
        from_texts(["a", ""], tokenizer, 4)
    with pytest.raises(ValueError, match="length=0"):
        from_texts(["a"], tokenizer, 0)


def test_every_corpus_has_the_splits_it_promises():
    for corpus in calibration.CORPORA.values():
        for split in calibration.SPLITS:
            stored = (corpus.aliases or {}).get(split, split)
            assert corpus.files is None or stored in corpus.files
