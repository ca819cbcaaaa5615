"""A transformers tokenizer as GGUF metadata: the inverse of `storage.tokenizer`, checked by that reader.

GGUF names how text is cut by a word and keeps scores where tokenizer.json has an order of merges, so what is
written is read back, and must give the same tokens on `PROBES`.
"""

import json
from pathlib import Path
from typing import Any

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.tokenizer import CONTROL, NORMAL, PREFIX, USER_DEFINED, gguf_tokenizer

UNKNOWN, UNUSED, BYTE = 2, 5, 6
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken")
PROBES = (
    "Hello world! It's 2024: they'll've paid $1,234.56 (or 9876543210)... don't YOU'RE",
    "  two  spaces,\ttabs\n\n new lines \r\n   and trailing   ",
    "def f(x):\n        return {'a': [x**2 for _ in range(10)]}  # ok?",
    "Ünïcödé naïve Straße ΑΩ Привет мир שלום مرحبا 你好,世界 こんにちは 한국어 🙂👩‍💻 e\u0301 x\u00b2 ½",
    "camelCaseWords HTTPServer snake_case",
)


def tokenizer_metadata(tokenizer: Any, *, vocab_size: int, context_length: int) -> dict[str, Any]:
    """Metadata under `tokenizer.` that describes a fast tokenizer.

    Args:
        tokenizer: a `transformers.PreTrainedTokenizerFast`.
        vocab_size: rows of the embedding; ids that no token has are filled.
        context_length: of the model.

    Raises:
        ValueError: the tokenizer is of a kind GGUF cannot describe.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"a {model.get('type')} tokenizer has no place in GGUF here: only BPE has.")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(backend, vocab_size)
    metadata: dict[str, Any] = {
        "model": "llama" if sentencepiece else "gpt2",
        "tokens": tokens,
        "token_type": types,
        **_special_ids(tokenizer),
        **_added_ends(tokenizer),
    }
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if sentencepiece:
        metadata["scores"] = _scores(tokens, types, merges)
        candidates = [{"pre": "default", "add_space_prefix": prefix} for prefix in (True, False)]
    else:
        metadata["merges"] = [" ".join(merge) for merge in merges]
        candidates = [{"pre": name} for name in PRE_TOKENIZERS]
    for candidate in candidates:
        described = {PREFIX + key: value for key, value in {**metadata, **candidate}.items()}
        if isinstance(tokenizer.chat_template, str):
            described["tokenizer.chat_template"] = tokenizer.chat_template
        if _same_tokens(tokenizer, described, context_length):
            return described
    raise ValueError("the tokenizer cuts text in a way that none of GGUF's pre-tokenizers known here does.")


def _tokens(backend: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    model = backend["model"]
    by_id = {index: (token, _type(token, model)) for token, index in model["vocab"].items()}
    for token in backend["added_tokens"]:
        if token["content"] != model.get("unk_token") or not model.get("byte_fallback"):
            by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if by_id and max(by_id) >= vocab_size:
        raise ValueError(f"the tokenizer has a token {max(by_id)}, but the embedding has {vocab_size} rows.")
    rows = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocab_size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _type(token: str, model: dict[str, Any]) -> int:
    if not model.get("byte_fallback"):
        return NORMAL
    if token == model.get("unk_token"):
        return UNKNOWN
    return BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {key: getattr(tokenizer, f"{name}_token_id") for key, name in names.items()}
    return {f"{key}_token_id": index for key, index in ids.items() if index is not None}


def _added_ends(tokenizer: Any) -> dict[str, bool]:
    """Whether text is put between a token of beginning and one of end."""
    encode = tokenizer.backend_tokenizer.encode
    bare, whole = (encode("a", add_special_tokens=special).ids for special in (False, True))
    return {
        "add_bos_token": bool(whole) and whole[0] == tokenizer.bos_token_id and whole != bare,
        "add_eos_token": bool(whole) and whole[-1] == tokenizer.eos_token_id and whole[-1:] != bare[-1:],
    }


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """As SentencePiece numbers its pieces: minus the place of the first merge that makes them."""
    place: dict[str, int] = {}
    for left, right in merges:
        place.setdefault(left + right, len(place))
    after = len(place)
    return [
        -float(place.get(token, after + index)) if kind == NORMAL else 0.0
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _same_tokens(tokenizer: Any, metadata: dict[str, Any], context_length: int) -> bool:
    try:
        read = gguf_tokenizer(Path("export"), metadata, context_length=context_length)
    except CheckpointError:
        return False
    assert read is not None  # the metadata describes one
    probes = [*PROBES, f"one{tokenizer.eos_token}two" if tokenizer.eos_token else ""]
    for text in probes:
        # The Rust tokenizers, which do not warn of texts longer than the model's context.
        one, other = (found.backend_tokenizer.encode(text).ids for found in (tokenizer, read))
        if one != other or tokenizer.decode(one) != read.decode(other):
            return False
    return True
