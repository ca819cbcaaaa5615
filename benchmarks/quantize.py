"""Seconds and memory of quantizing all of SmolLM2-135M, in a process of its own.

    python benchmarks/quantize.py --calibration wiki_calibration.txt
    python benchmarks/quantize.py --bits 3 --asymmetric --samples 32 --repeat 3

Without a file, Python's own documentation serves. Fetching the model (once, by pip) is not part of the figures, nor
is loading it, which has a column of its own.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from measuring import RESULTS, Child, setting, table, write
from models import NAME, source_name

from gptq_jax.demo import fetch_model

PRODUCTS = ("forward", "hessian")  # stages that are matrix products and little else


def render(rows: list[dict[str, Any]]) -> str:
    """A line a run."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    return table(
        [
            "run",
            "wall s",
            "CPU s",
            *(f"{stage} s" for stage in stages),
            "other s",
            "forward + hessian",
            "peak memory GB",
            "of which before",
            "load s",
            "loss / rounding's",
            "bits per weight",
            "fallbacks",
        ],
        [
            [
                row["run"],
                f"{row['wall']:.1f}",
                f"{row['cpu']:.1f}",
                *(f"{row['stages'].get(stage, 0):.1f}" for stage in stages),
                f"{row['wall'] - sum(row['stages'].values()):.1f}",
                f"{row['products_share']:.0%}",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['resident_after_load'] / 1e9:.2f}",
                f"{row['load_seconds']:.1f}",
                f"{row['layer_loss'] / row['rounding_loss']:.3f}",
                f"{row['bits_per_weight']:.3f}",
                len(row["fallbacks"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text file; Python's documentation if left out")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1, help="runs, each in a new process")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    if options.calibration and not options.calibration.is_file():
        parser.error(f"--calibration: {options.calibration} does not exist.")

    spec = {"bits": options.bits, "group_size": options.group_size, "symmetric": not options.asymmetric}
    about = setting(
        model=NAME,
        grid=spec,
        method="gptq(), the default",
        calibration=f"{options.samples} x {options.length} tokens of {source_name(options.calibration)}",
        seed=options.seed,
    )
    fetch_model()
    text = str(options.calibration.resolve()) if options.calibration else None
    rows: list[dict[str, Any]] = []
    for run in range(1, options.repeat + 1):
        with Child([sys.executable, Path(__file__).with_name("quantize_child.py")]) as child:
            found = child.ask(
                do="run", spec=spec, text=text, samples=options.samples, length=options.length, seed=options.seed
            )
        share = sum(found["stages"].get(stage, 0.0) for stage in PRODUCTS) / found["wall"]
        rows.append({"run": run, **found, "products_share": share})
        print(f"run {run}: {found['wall']:.1f} s, peak {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
        write(options.out, "Quantizing a whole model", about, rows, render(rows))
    print(f"\n{render(rows)}\n\nwrote {options.out}.json and .md")


if __name__ == "__main__":
    main()
