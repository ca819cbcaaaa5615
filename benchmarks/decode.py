"""Tokens per second and memory of greedy decoding at batch 1: the quantized SmolLM2-135M against float32.

    python benchmarks/decode.py
    python benchmarks/decode.py --store smollm2-4bit --repeat 10

Each model lives in a process of its own; they take turns. Tokens per second count from the first new token to the
last; the prompt's prefill is in the column of the first token. Warm-up uses another prompt. Without --store, weights
are rounded to nearest, which decodes as fast as any other codes of the same format.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import RESULTS, Child, setting, table, write
from models import NAME

from gptq_jax.demo import fetch_model
from gptq_jax.storage.store import is_store

WARM_UP = "A list comprehension in Python is"
PROMPT = "The history of mathematics began when people first had to count and measure things, and"


def measure(children: dict[str, Child], new_tokens: int, repeat: int) -> list[dict[str, Any]]:
    """A row for each model."""
    for child in children.values():
        child.ask(do="decode", prompt=WARM_UP, new_tokens=new_tokens)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for _ in range(repeat):
        for name, child in children.items():
            samples[name].append(child.ask(do="decode", prompt=PROMPT, new_tokens=new_tokens))
    rows = []
    for name, each in samples.items():
        speeds = [sample["tokens_per_second"] for sample in each]
        rows.append(
            {
                "weights": name,
                "tokens_per_second_median": statistics.median(speeds),
                "tokens_per_second_best": max(speeds),
                "cpu_per_token_median": statistics.median(sample["cpu"] for sample in each) / (new_tokens - 1),
                "first_token_seconds_median": statistics.median(sample["first_token_seconds"] for sample in each),
                "resident_growth": each[-1]["resident_growth"],
                "peak_bytes": each[-1]["peak_bytes"],
                "always_same_tokens": all(sample["tokens"] == each[0]["tokens"] for sample in each),
                "samples": each,
            }
        )
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """A line for each model and one for their ratios."""
    floating, packed = rows
    columns = (
        ("tokens per second (median)", "tokens_per_second_median", 1, ".1f"),
        ("best", "tokens_per_second_best", 1, ".1f"),
        ("CPU ms a token", "cpu_per_token_median", 1e-3, ".1f"),
        ("first token s", "first_token_seconds_median", 1, ".3f"),
        ("parameters MB", "parameter_bytes", 1e6, ".1f"),
        ("memory growth MB", "resident_growth", 1e6, ".0f"),
        ("peak memory MB", "peak_bytes", 1e6, ".0f"),
        ("load s", "load_seconds", 1, ".2f"),
    )
    lines = [[row["weights"], *(f"{row[key] / unit:{form}}" for _, key, unit, form in columns)] for row in rows]
    lines.append(["quantized / float32", *(f"{packed[key] / floating[key]:.3f}" for _, key, _, _ in columns)])
    return table(["weights", *(heading for heading, *_ in columns)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="SmolLM2-135M quantized by gptq-jax")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 8], help="without --store")
    parser.add_argument("--group-size", type=int, default=64, help="without --store")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5, help="timings of each model")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    if options.store and not is_store(options.store):
        parser.error(f"--store: {options.store} is no directory written by gptq-jax.")
    if options.new_tokens < 2:
        parser.error("--new-tokens: at least 2, since time is counted from the first to the last.")

    fetch_model()
    spec = {"bits": options.bits, "group_size": options.group_size}
    about = setting(
        model=NAME,
        quantized=options.store.name if options.store else f"rounded to nearest, {spec}",
        new_tokens=options.new_tokens,
        repeat=options.repeat,
    )
    script = Path(__file__).with_name("decode_child.py")
    with tempfile.TemporaryDirectory() as folder:
        store = options.store
        if store is None:
            store = Path(folder) / "store"
            with Child([sys.executable, script]) as maker:
                maker.ask(do="make_store", path=str(store), spec=spec)
        with Child([sys.executable, script]) as floating, Child([sys.executable, script]) as packed:
            children = {"float32": floating, "quantized": packed}
            loads = {
                name: child.ask(do="take", path=str(store.resolve()) if child is packed else None)
                for name, child in children.items()
            }
            rows = [{**row, **loads[row["weights"]]} for row in measure(children, options.new_tokens, options.repeat)]
    write(options.out, "Decoding on a CPU at batch 1", about, rows, render(rows))
    print(f"{render(rows)}\n\nwrote {options.out}.json and .md")


if __name__ == "__main__":
    main()
