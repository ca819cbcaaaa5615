"""Perplexity of SmolLM2-135M quantized by rounding and by variants of GPTQ, on held-out text.

    python benchmarks/accuracy.py --calibration wiki_calibration.txt --held-out wiki_valid.txt
    python benchmarks/accuracy.py --seeds 0,1,2 --rows rtn,default --bits 2

Without files, Python's own documentation serves. Windows of both texts are drawn at random by the seed, so that
single figures move by a few percent from draw to draw: compare the rows of one draw.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, setting, table, write
from models import NAME, calibration, dequantized, float_model, read_text, source_name, windows

from gptq_jax.evaluate import compare
from gptq_jax.methods import Method, coordinate_descent, gptaq, gptq, hqq, qep, rtn
from gptq_jax.models.base import Model
from gptq_jax.pipeline import quantize
from gptq_jax.spec import QuantSpec

METHODS: dict[str, tuple[str, Method]] = {
    "rtn": ("rounding to nearest", rtn()),
    "natural": ("GPTQ, natural order, minmax grid", gptq(order="natural", grid="minmax")),
    "activation": ("GPTQ, activation order, minmax grid", gptq(order="activation", grid="minmax")),
    "mse": ("GPTQ, activation order, mse grid", gptq(order="activation", grid="mse")),
    "default": ("GPTQ, activation order, LDL-weighted mse grid (the default)", gptq()),
    "descent": ("the default, 2 passes of coordinate descent", coordinate_descent(gptq())),
    "hqq": ("HQQ, without calibration", hqq()),
    "hqq_mse": ("HQQ from the mse grid", hqq("mse")),
    "gptaq": ("GPTAQ 0.25 with the default", gptaq()),
    "qep": ("QEP 0.5 with the default", qep()),
}
ROWS = "rtn,natural,activation,mse,default,gptaq,qep"
# An earlier run of the same algorithms by a separate program: 3 bits, groups of 64, asymmetric, 32 x 512 tokens of
# Wikipedia, 24 x 512 held out. Another draw of windows than any seed gives here.
REFERENCE = {
    "float": 20.71,
    "rtn": 62.99,
    "natural": 53.24,
    "activation": 40.14,
    "mse": 36.13,
    "default": 33.91,
    "qep": 28.92,
}


def measure(model: Model, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The rows of one draw; each is printed as it comes."""
    spec = QuantSpec(bits=options.bits, group_size=options.group_size, symmetric=options.symmetric)
    fit = calibration(options.calibration, model.tokenizer, options.samples, options.length, seed)
    text = read_text(options.held_out, held_out=True)
    held_out = windows(text, model.tokenizer, options.held_out_samples, options.length, seed).reshape(-1)
    rows: list[dict[str, Any]] = []
    for name in options.rows.split(","):
        started = time.perf_counter()
        packed, report = quantize(model, fit, spec, METHODS[name][1])
        seconds = time.perf_counter() - started
        found = compare(dequantized(packed), model, held_out, length=options.length, batch_size=4)
        if not rows:
            rows.append({"row": "float", "seed": seed, "perplexity": found.other_perplexity})
            print(f"seed {seed}, float: perplexity {found.other_perplexity:.3f}", flush=True)
        rows.append(
            {
                "row": name,
                "seed": seed,
                "perplexity": found.perplexity,
                "kl": found.kl,
                "top1_agreement": found.top1_agreement,
                "layer_loss": report.loss,
                "bits_per_weight": report.bits_per_weight,
                "fallbacks": list(report.fallbacks),
                "quantize_seconds": seconds,
            }
        )
        print(f"seed {seed}, {name}: perplexity {found.perplexity:.3f}, KL {found.kl:.4f}, {seconds:.0f} s", flush=True)
    rounded = next((row["perplexity"] for row in rows if row["row"] == "rtn"), None)
    for row in rows[1:]:
        floating = rows[0]["perplexity"]
        row["gap_to_rounding"] = None if rounded is None else (row["perplexity"] - floating) / (rounded - floating)
    return rows


def render(rows: list[dict[str, Any]], with_reference: bool) -> str:
    """A line a row, each figure the mean over seeds, and the perplexity of each seed."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        mine = [row for row in rows if row["row"] == name]

        def mean(key: str, mine: list[dict[str, Any]] = mine) -> float | None:
            values = [row[key] for row in mine if row.get(key) is not None]
            return statistics.fmean(values) if values else None

        kl, agreement = mean("kl"), mean("top1_agreement")
        perplexity = statistics.fmean(row["perplexity"] for row in mine)
        lines.append(
            [
                "float32" if name == "float" else METHODS[name][0],
                f"{perplexity:.2f}",
                None if (gap := mean("gap_to_rounding")) is None else f"{gap:.3f}",
                None if kl is None else f"{kl:.4f}",
                None if agreement is None else f"{agreement:.1%}",
                None if (bits := mean("bits_per_weight")) is None else f"{bits:.2f}",
                None if (seconds := mean("quantize_seconds")) is None else f"{seconds:.0f}",
                ", ".join(f"{row['perplexity']:.2f}" for row in mine),
            ]
        )
        if with_reference:
            expected = REFERENCE.get(name)
            if expected is None:
                lines[-1] += [None, None, None]
                continue
            lines[-1] += [f"{expected:.2f}", f"{perplexity / expected:.3f}"]
            gap = (expected - REFERENCE["float"]) / (REFERENCE["rtn"] - REFERENCE["float"])
            lines[-1].append(None if name == "float" else f"{gap:.3f}")
    headings = [
        "weights",
        "perplexity",
        "gap to float / rounding's gap",
        "KL to float",
        "same top token",
        "bits per weight",
        "quantize s",
        "perplexity by seed",
    ]
    if with_reference:
        headings += ["reference perplexity", "ours / reference", "reference gap / rounding's"]
    return table(headings, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text file; Python's documentation if left out")
    parser.add_argument("--held-out", type=Path, help="text file; the last tenth of that documentation if left out")
    parser.add_argument("--rows", default=ROWS, help=f"of the table, separated by commas, out of {', '.join(METHODS)}")
    parser.add_argument("--seeds", default="0", help="draws of windows, separated by commas")
    parser.add_argument("--bits", type=int, default=3, choices=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--held-out-samples", type=int, default=24, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - set(METHODS):
        parser.error(f"--rows: no row {sorted(unknown)}; there are {list(METHODS)}.")
    for name in ("calibration", "held_out"):
        if (path := getattr(options, name)) and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: {path} does not exist.")
    if (options.calibration is None) != (options.held_out is None):
        parser.error("give both --calibration and --held-out, or neither.")

    about = setting(
        model=NAME,
        grid=str(QuantSpec(bits=options.bits, group_size=options.group_size, symmetric=options.symmetric)),
        calibration=f"{options.samples} x {options.length} tokens of {source_name(options.calibration)}",
        held_out=f"{options.held_out_samples} x {options.length} tokens of {source_name(options.held_out)}",
        seeds=options.seeds,
    )
    same_setting = (options.bits, options.group_size, options.symmetric, options.samples) == (3, 64, False, 32)
    with_reference = same_setting and options.calibration is not None and options.length == 512
    model = float_model()
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        rows += measure(model, options, seed)
        text = render(rows, with_reference)
        if with_reference:
            text += (
                "\n\nThe reference is an earlier run by a separate program with the same settings and Wikipedia text,"
            )
            text += " on another draw of windows."
        write(options.out, "Perplexity by method", about, rows, text)
    print(f"\n{text}\n\nwrote {options.out}.json and .md")


if __name__ == "__main__":
    main()
