"""Perplexity of SmolLM2-135M quantized by rounding, by GPTQ and by everything else, on held-out text.

    python benchmarks/accuracy.py --calibration wiki_calibration.txt --held-out wiki_valid.txt
    python benchmarks/accuracy.py --rows rtn,gptq,qep --bits 2,3 --group-size 64,-1 --seeds 0,1,2 --cells DIR

Without files, Python's own documentation serves. Seeds draw the calibration windows; the held-out windows, at random
places of their text, are the same for all runs. A run takes about two minutes on two cores: with --cells each is kept,
and the same command goes on after the last one.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from measuring import RESULTS, setting, table, write
from models import NAME, float_model, read_text, source_name, windows

from gptq_jax.calibration import token_stream
from gptq_jax.comparison import ComparisonTable, compare_methods
from gptq_jax.comparison.table import Row, Spread
from gptq_jax.correction import low_rank_correction
from gptq_jax.distillation import end_to_end_tuning
from gptq_jax.methods import Method, coordinate_descent, fractional_zeros, gptaq, gptq, hqq, qep, rtn
from gptq_jax.rewrites import awq, hadamard, smooth
from gptq_jax.self_calibration import SELF
from gptq_jax.spec import QuantSpec
from gptq_jax.tuning import block_tuning, learned_rounding

TURNED = hadamard(values=True)
TUNED = block_tuning()
METHODS: dict[str, tuple[str, Method]] = {
    "rtn": ("rounding to nearest", rtn()),
    "natural": ("GPTQ, natural order, minmax grid", gptq(order="natural", grid="minmax")),
    "activation": ("GPTQ, activation order, minmax grid", gptq(order="activation", grid="minmax")),
    "mse": ("GPTQ, activation order, mse grid", gptq(order="activation", grid="mse")),
    "gptq": ("GPTQ (the default: activation order, LDL-weighted mse grid)", gptq()),
    "group": ("GPTQ, group-aware order", gptq(order="group")),
    "dynamic": ("GPTQ, activation order, dynamic groups (desc_act)", gptq(static_groups=False)),
    "descent": ("GPTQ, then 2 passes of coordinate descent", coordinate_descent(gptq())),
    "hqq": ("HQQ, without calibration", hqq()),
    "awq_rtn": ("AWQ + rounding", rtn()._replace(rewrite=awq())),
    "hadamard_rtn": ("Hadamard + rounding", rtn()._replace(rewrite=hadamard())),
    "autoround": ("learned rounding (SignRound)", rtn()._replace(tuning=learned_rounding())),
    "smooth": ("smoothing + GPTQ", gptq()._replace(rewrite=smooth())),
    "awq": ("AWQ + GPTQ", gptq()._replace(rewrite=awq(grid="ldl"))),
    "hadamard": ("Hadamard + GPTQ", gptq()._replace(rewrite=hadamard())),
    "eora": ("GPTQ, with factors of rank 16 (EoRA)", gptq()._replace(finish=low_rank_correction(16))),
    "gptaq": ("GPTAQ 0.25", gptaq()),
    "qep": ("QEP 0.5 + GPTQ", qep()),
    "awq_qep": ("AWQ + QEP", qep()._replace(rewrite=awq(grid="ldl"))),
    "hadamard_qep": ("Hadamard + QEP", qep()._replace(rewrite=hadamard())),
    "turned_qep": ("Hadamard, values too, + QEP", qep()._replace(rewrite=TURNED)),
    "online_qep": ("Hadamard, values and online, + QEP", qep()._replace(rewrite=hadamard(values=True, online=True))),
    "autoround_qep": ("QEP, then learned rounding", qep()._replace(tuning=learned_rounding())),
    "tune_qep": ("QEP, then tuned block by block", qep()._replace(tuning=TUNED)),
    "eora_qep": ("QEP, with factors of rank 16", qep()._replace(finish=low_rank_correction(16, alpha=0.5))),
    "distill_qep": ("QEP, then distilled", qep()._replace(finish=end_to_end_tuning())),
    "tune_turned_qep": ("Hadamard, values too, + QEP, then tuned", qep()._replace(rewrite=TURNED, tuning=TUNED)),
    "autoround_turned_qep": (
        "Hadamard, values too, + QEP, then learned rounding",
        qep()._replace(rewrite=TURNED, tuning=learned_rounding()),
    ),
    "distill_tune_turned_qep": (
        "Hadamard, values too, + QEP, then tuned, then distilled",
        qep()._replace(rewrite=TURNED, tuning=TUNED, finish=end_to_end_tuning()),
    ),
    "fractions": (
        "Hadamard, values too, + QEP, zero points as fractions, then tuned, then distilled",
        fractional_zeros(qep())._replace(rewrite=TURNED, tuning=TUNED, finish=end_to_end_tuning()),
    ),
}


class Reference(NamedTuple):
    """Perplexity of the float model, and by bits and row that of quantized ones."""

    floating: float
    rows: dict[int, dict[str, float]]


# Earlier runs of the same algorithms by a separate program, by held-out text: groups of 64, asymmetric, 32 x 512 tokens
# of Wikipedia, 24 x 512 held out. Other draws of windows than ours; and the Brown corpus made into text otherwise.
REFERENCE = {
    "wiki_valid.txt": Reference(
        20.71,
        {
            2: {"mse": 133.7, "qep": 81.4},
            3: {"rtn": 62.99, "natural": 53.24, "activation": 40.14, "mse": 36.13, "gptq": 33.91, "qep": 28.92},
            4: {"mse": 24.35, "qep": 22.38},
        },
    ),
    "brown.txt": Reference(
        36.91,
        {
            2: {"mse": 225.4, "qep": 147.3},
            3: {"rtn": 106.44, "natural": 86.97, "activation": 68.24, "mse": 63.19, "gptq": 59.54, "qep": 51.06},
            4: {"mse": 42.54, "qep": 39.90},
        },
    ),
}


def render(found: ComparisonTable, known: Reference | None) -> str:
    """A table for each grid of weights, beside what else is known of it; every figure is the mean over seeds."""
    sections = []
    for grid in dict.fromkeys(row.grid for row in found.rows()):
        rows = [row for row in found.rows() if row.grid == grid and row.seeds]
        reference = known.rows.get(rows[0].spec.bits, {}) if known and rows[0].spec.group_size == 64 else {}
        floating = found.float_figures.perplexity
        rounded = next((row.values["perplexity"].mean for row in rows if row.method == "rtn"), None)
        lines = [["float32", f"{floating:.2f}", None, "0", "100.0%", None, None, *([None, None] * bool(reference))]]
        for row in rows:
            gap = None if rounded is None else (row.values["perplexity"].mean - floating) / (rounded - floating)
            line = [
                METHODS[row.method][0],
                _spread(row.values["perplexity"], 2),
                None if gap is None else f"{gap:.3f}",
                _spread(row.values["kl"], 4),
                f"{row.values['top1_agreement'].mean:.1%}",
                f"{row.values['bits_per_weight'].mean:.2f}",
                _seeds(row, found),
            ]
            if known and reference:
                expected = reference.get(row.method)
                ours = row.values["perplexity"].mean / floating  # over the float model's: the windows are others
                line += (
                    [None, None]
                    if expected is None
                    else [f"{expected:.2f}", f"{ours / (expected / known.floating):.3f}"]
                )
            lines.append(line)
        headings = ["weights", "perplexity", "gap to float / rounding's gap", "KL to float", "same top token"]
        headings += ["bits per weight", "perplexity by seed"]
        headings += ["reference perplexity", "over float, ours / reference"] * bool(reference)
        sections.append(f"## {grid}\n\n{table(headings, lines)}")
    sections += [f"{result.cell.label} failed: {result.failed}" for result in found.failures]
    return "\n\n".join(sections)


def overview(found: ComparisonTable) -> str:
    """Each method at each grid: its perplexity and, in brackets, KL to float; the mean over seeds."""
    rows = {(row.method, row.grid): row for row in found.rows() if row.seeds}
    known = list(dict.fromkeys(grid for _, grid in rows))
    lines = [["float32", *[f"{found.float_figures.perplexity:.2f}"] * len(known)]]
    for method, (title, _) in METHODS.items():
        cells = [rows.get((method, grid)) for grid in known]
        if any(cells):
            lines.append([title, *(None if row is None else _both(row) for row in cells)])
    return table(["weights", *known], lines)


def _both(row: Row) -> str:
    return f"{_spread(row.values['perplexity'], 2)} ({row.values['kl'].mean:.3f})"


def _spread(value: Spread, digits: int) -> str:
    return f"{value.mean:.{digits}f}" + ("" if value.deviation is None else f" ± {value.deviation:.{digits}f}")


def _seeds(row: Row, found: ComparisonTable) -> str:
    mine = [each for each in found.cells if (each.cell.method, each.cell.spec) == (row.method, row.spec)]
    return ", ".join(f"{each.figures.perplexity:.2f}" for each in mine if each.figures)


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Seconds are quantize.py's to tell: here, runs may share the machine with others."""
    values = {name: value for name, value in row["values"].items() if "seconds" not in name and name != "peak_bytes"}
    return {**row, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibration",
        type=Path,
        help="text file; self: text that the model writes; Python's documentation if left out",
    )
    parser.add_argument("--held-out", type=Path, help="text file; the last tenth of that documentation if left out")
    parser.add_argument(
        "--rows", default="rtn,gptq,qep", help=f"separated by commas, out of {', '.join(METHODS)}; or all"
    )
    parser.add_argument("--seeds", type=_numbers, default=[0], help="draws of calibration windows")
    parser.add_argument("--bits", type=_numbers, default=[3])
    parser.add_argument("--group-size", type=_numbers, default=[64], help="-1: the whole column")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--held-out-samples", type=int, default=24, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--cells", type=Path, help="a directory that keeps each run")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    names = list(METHODS) if options.rows == "all" else options.rows.split(",")
    if unknown := set(names) - set(METHODS):
        parser.error(f"--rows: no row {sorted(unknown)}; there are {list(METHODS)}.")
    for name in ("calibration", "held_out"):
        path = getattr(options, name)
        if path and not path.is_file() and (name, str(path)) != ("calibration", SELF):
            parser.error(f"--{name.replace('_', '-')}: {path} does not exist.")
    if (options.calibration is None) != (options.held_out is None):
        parser.error("give both --calibration and --held-out, or neither.")
    writes = str(options.calibration) == SELF
    source = "text that the model wrote" if writes else source_name(options.calibration)
    about = setting(
        model=NAME,
        calibration=f"{options.samples} x {options.length} tokens of {source}",
        held_out=f"{options.held_out_samples} x {options.length} tokens of {source_name(options.held_out)}",
    )
    like_reference = not (options.symmetric or writes) and (options.samples, options.length) == (32, 512)
    known = REFERENCE.get(source_name(options.held_out)) if like_reference else None
    model = float_model()
    text = read_text(options.held_out, held_out=True)
    found = compare_methods(
        model,
        {name: METHODS[name][1] for name in names},
        [
            QuantSpec(bits=bits, group_size=size, symmetric=options.symmetric)
            for bits in options.bits
            for size in options.group_size
        ],
        SELF if writes else token_stream(read_text(options.calibration), model.tokenizer),
        windows(text, model.tokenizer, options.held_out_samples, options.length, 0).reshape(-1),
        seeds=options.seeds,
        samples=options.samples,
        length=options.length,
        eval_batch_size=4,
        out=options.cells,
        progress=True,
    )
    report = f"{overview(found)}\n\n{render(found, known)}"
    write(options.out, "Perplexity by method", about, list(map(_without_times, found.to_json()["rows"])), report)
    print(f"{report}\n\nwrote {options.out}.json and .md")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
