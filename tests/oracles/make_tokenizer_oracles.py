"""Make the committed token ids from transformers and from sentencepiece.

    python tests/oracles/make_tokenizer_oracles.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs torch, transformers, gguf and sentencepiece, in an environment of their own. Writes
`tokens_smollm2.json` (ids from transformers' own GGUF reader) and `tokens_sentencepiece.json` (a tiny model
trained here, as a GGUF file would describe it, and ids from sentencepiece itself). Last made with
transformers 5.23.0 and sentencepiece 0.2.3.
"""

import io
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import transformers

HERE = Path(__file__).parent
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces,\ttabs\t\tand\n\n\nnewlines \r\n and a trailing one ",
    "I'll we're DON'T it's o'clock 'quoted'",
    "1234567890 3.14159 1e-5 2024-02-29 १२३ 一二三",
    "naïve façade Ünïcödé Ελληνικά русский עברית العربية हिन्दी",
    "漢字かな交じり文 한국어 🤗👩‍👩‍👧 e\u0301 \u00a0\u200b\ufeff",
    "def f(x: int = 3) -> list[int]:\n    return [x**2 for _ in range(10)]  # ok\n",
    '{"a": [1, 2.5, null], "b": "\\u00e9"} <div class="x">&amp;</div>',
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>after",
    "",
]
SPECIAL = {"user_defined_symbols": ["<sep>"], "control_symbols": ["<ctl>"]}
PIECE_TYPES = (("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6))


def smollm2(path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    write("tokens_smollm2.json", {"pairs": [[text, tokenizer(text)["input_ids"]] for text in TEXTS]})


def tiny_sentencepiece() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:4] + topics["numeric-types"].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        **SPECIAL,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    types = [next((number for test, number in PIECE_TYPES if getattr(processor, test)(i)), 1) for i in range(size)]
    for symbol in SPECIAL["user_defined_symbols"]:
        types[processor.piece_to_id(symbol)] = 4
    texts = [*TEXTS, "These methods are called to implement the binary arithmetic operations"]
    write(
        "tokens_sentencepiece.json",
        {
            "tokens": [processor.id_to_piece(i) for i in range(size)],
            "scores": [processor.get_score(i) for i in range(size)],
            "token_type": types,
            "pairs": [[text, processor.encode(text)] for text in texts],
        },
    )


def write(name: str, content: dict) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(name, [len(ids) for _, ids in content["pairs"]])


if __name__ == "__main__":
    smollm2(Path(sys.argv[1]))
    tiny_sentencepiece()
