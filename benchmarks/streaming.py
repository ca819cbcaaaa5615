"""Seconds and peak memory of `gptq-jax quantize` on synthetic checkpoints, against depth, width, samples and devices.

    python benchmarks/streaming.py                     # small ones: some minutes
    python benchmarks/streaming.py --blocks 24,48 --widths 2560 --samples 8 --devices 1

Each row is a process of its own, whose peak is the system's own count (`ru_maxrss`); the first row is one that imports
the package and compiles one product. Devices are those that `--xla_force_host_platform_device_count` makes of one
processor: they show that memory and results are right, not speed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, setting, table, write
from synthetic import TEXT, write_llama

BASELINE = "import gptq_jax, jax, jax.numpy as jnp; jax.jit(jnp.matmul)(jnp.ones((8, 8)), jnp.ones((8, 8)))"


def measured(command: list[str], devices: int = 1) -> dict[str, float]:
    """Wall seconds and peak bytes of a process; RuntimeError if it fails."""
    flags = {} if devices == 1 else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env={**os.environ, **flags}, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(errors.read().decode()[-2000:])
    scale = 1 if sys.platform == "darwin" else 1024
    return {"wall": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * scale}


def render(rows: list[dict[str, Any]]) -> str:
    """A line a run."""
    baseline = rows[0]["peak_bytes"]
    return table(
        ["blocks", "width", "checkpoint GB", "samples", "devices", "wall s", "peak MB", "over the interpreter MB"],
        [
            [
                row.get("blocks", "none"),
                row.get("width", ""),
                f"{row['model_bytes'] / 1e9:.2f}" if "model_bytes" in row else "",
                row.get("samples", ""),
                row.get("devices", ""),
                f"{row['wall']:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{(row['peak_bytes'] - baseline) / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=numbers, default=[4, 8, 16], help="the first is that of the other tables")
    parser.add_argument("--widths", type=numbers, default=[512, 1024], help="the inner width is 8/3 of it")
    parser.add_argument("--samples", type=numbers, default=[16, 64], help="calibration windows")
    parser.add_argument("--devices", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming")
    arguments = parser.parse_args()
    first = (arguments.blocks[0], arguments.widths[0], arguments.samples[0], arguments.devices[0])
    cases = dict.fromkeys(
        [
            *((blocks, *first[1:]) for blocks in arguments.blocks),
            *((first[0], width, *first[2:]) for width in arguments.widths),
            *((*first[:2], samples, first[3]) for samples in arguments.samples),
            *((*first[:3], devices) for devices in arguments.devices),
        ]
    )
    rows: list[dict[str, Any]] = [measured([sys.executable, "-c", BASELINE])]
    taken = setting(length=arguments.length, bits=arguments.bits)
    for blocks, width, samples, devices in cases:
        folder = Path(tempfile.mkdtemp(prefix="streaming-"))
        try:
            model_bytes = write_llama(folder / "model", blocks=blocks, width=width, hidden=width * 8 // 3 // 64 * 64)
            (folder / "text.txt").write_text(TEXT)
            command = [
                sys.executable,
                "-m",
                "gptq_jax.cli",
                "quantize",
                str(folder / "model"),
                "--out",
                str(folder / "out"),
            ]
            command += ["--calibration", str(folder / "text.txt"), "--samples", str(samples), "--batch-size", "2"]
            command += ["--length", str(arguments.length), "--bits", str(arguments.bits), "--group-size", "64"]
            row = measured([*command, "--devices", str(devices)], devices)
        finally:
            shutil.rmtree(folder)
        case = {"blocks": blocks, "width": width, "samples": samples, "devices": devices}
        rows.append(case | {"model_bytes": model_bytes} | row)
        write(arguments.out, "Quantizing block by block", taken, rows, render(rows))
    print(render(rows))


if __name__ == "__main__":
    main()
