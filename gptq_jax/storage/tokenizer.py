"""A fast tokenizer from the vocabulary, merges and flags in a GGUF file's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_jax.storage.base import CheckpointError

PREFIX = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
SPACE = "▁"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How text is cut before byte-level BPE.

    Attributes:
        patterns: regexes whose matches become words of their own, one after the other.
        whole_words: a word that is a token is taken as it is, without merging.
        normal_form: apply Unicode's NFC first.
        add_bos: the default where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    normal_form: bool = False
    add_bos: bool = False


_PLAIN = Splitting(patterns=(_GPT2,))
_SINGLE_DIGITS = Splitting(patterns=(r"\p{N}", _GPT2))
_LLAMA3_SPLITTING = Splitting(patterns=(_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_SPLITTING = Splitting(patterns=(_QWEN2,), normal_form=True)
# By tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp reads it.
SPLITTINGS = {
    "default": _PLAIN,
    "gpt-2": _PLAIN,
    "olmo": _PLAIN,
    "mpt": _PLAIN,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "qwen2": _QWEN2_SPLITTING,
    "deepseek-r1-qwen": _QWEN2_SPLITTING,
    "tekken": Splitting(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
}


def gguf_tokenizer(path: Path, metadata: Mapping[str, Any], *, context_length: int) -> Any | None:
    """Build the `transformers.PreTrainedTokenizerFast` that a GGUF file describes.

    Args:
        path: the file, for errors.
        metadata: its metadata.
        context_length: becomes `model_max_length`.

    Returns:
        The tokenizer, or None if the file says nothing of one.

    Raises:
        CheckpointError: the kind or the pre-tokenizer is not known, or the vocabulary is damaged.
    """
    kind = metadata.get(f"{PREFIX}model")
    if kind is None and f"{PREFIX}tokens" not in metadata:
        return None
    if kind not in _BUILDERS:
        raise CheckpointError(path, f"the tokenizer {kind!r} is not supported; {', '.join(sorted(_BUILDERS))} are.")
    fields = _Fields(path, metadata)
    tokens = fields.array("tokens", str)
    if not tokens:
        raise CheckpointError(path, "the tokenizer has no vocabulary (tokenizer.ggml.tokens).")
    types = fields.array("token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    try:
        backend, add_bos = _BUILDERS[kind](fields, tokens, types)
        _add_whole_tokens(backend, tokens, types)
        return _wrap(fields, backend, tokens, kind, add_bos, context_length)
    except CheckpointError:
        raise
    except Exception as error:
        # The Rust library raises plain Exception, for a merge whose parts are no tokens for example.
        raise CheckpointError(path, f"the tokenizer's vocabulary and merges do not fit: {error}") from error


class _Fields:
    """Checked access to the metadata under `tokenizer.ggml.`."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        values = self.metadata.get(PREFIX + key, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise CheckpointError(self.path, f"{PREFIX}{key} is not an array of {kind.__name__}.")
        if values and length is not None and len(values) != length:
            raise CheckpointError(self.path, f"{PREFIX}{key} has {len(values)} values for {length} tokens.")
        return values

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise CheckpointError(self.path, f"{PREFIX}{key} is {value!r}, not true or false.")
        return value

    def token(self, key: str, tokens: list[str], default: int | None = None) -> str | None:
        index = self.metadata.get(f"{PREFIX}{key}_token_id", default)
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(tokens):
            raise CheckpointError(
                self.path, f"{PREFIX}{key}_token_id is {index!r}, but there are {len(tokens)} tokens."
            )
        return tokens[index]


def _byte_level(fields: _Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.metadata.get(f"{PREFIX}pre", "default")
    if name not in SPLITTINGS:
        raise CheckpointError(
            fields.path, f"the pre-tokenizer {name!r} is not known; {', '.join(sorted(SPLITTINGS))} are."
        )
    splitting = SPLITTINGS[name]
    merges = [_split_merge(fields.path, merge) for merge in fields.array("merges", str)]
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=splitting.whole_words))
    if splitting.normal_form:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.add_bos


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.array("scores", float, len(tokens))
    if not scores:
        raise CheckpointError(fields.path, "the SentencePiece tokenizer has no scores (tokenizer.ggml.scores).")
    prefix = fields.flag("add_space_prefix", True)
    tokenizer = Tokenizer(
        models.BPE(
            _vocabulary(tokens),
            sentencepiece_merges(tokens, scores, types),
            unk_token=fields.token("unknown", tokens, 0),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace_spaces = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + replace_spaces)
    restore = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(restore + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer, True


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def sentencepiece_merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The BPE merges a SentencePiece vocabulary implies: all splits of a piece in two, best piece first.

    As transformers' `generate_merges` does; only normal pieces take part.
    """
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    rank = {token: index for index, token in reversed(list(enumerate(tokens)))}
    found = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind == NORMAL:
            splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            splits = [split for split in splits if split[0] in pieces and split[1] in pieces]
            found += [(score, *split) for split in sorted(splits, key=lambda split: (rank[split[0]], rank[split[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in reversed(list(enumerate(tokens)))}


def _split_merge(path: Path, merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a token may itself begin with a space
    if cut < 0:
        raise CheckpointError(path, f"tokenizer.ggml.merges holds {merge!r}, which is not two tokens.")
    return merge[:cut], merge[cut + 1 :]


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in the text before anything else is done to it."""
    from tokenizers import AddedToken

    def added(kind: int, *, special: bool) -> list[Any]:
        texts = [token for token, found in zip(tokens, types, strict=True) if found == kind and token]
        return [AddedToken(text, special=special, normalized=False) for text in texts]

    tokenizer.add_special_tokens(added(CONTROL, special=True))
    tokenizer.add_tokens(added(USER_DEFINED, special=False))


def _wrap(fields: _Fields, backend: Any, tokens: list[str], kind: str, add_bos: bool, context_length: int) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    special = {
        f"{name}_token": fields.token(key, tokens, defaults.get(key))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    template, used = ["$A"], []
    if fields.flag("add_bos_token", add_bos) and special["bos_token"]:
        template.insert(0, special["bos_token"])
    if fields.flag("add_eos_token", False) and special["eos_token"]:
        template.append(special["eos_token"])
    if len(template) > 1:
        used = [(token, backend.token_to_id(token)) for token in dict.fromkeys(template) if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    chat_template = fields.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
        **({"chat_template": chat_template} if isinstance(chat_template, str) else {}),
    )
