"""Times x @ packed weight against a float32 product and against dequantize-then-multiply.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --shapes 4096x4096 --tokens 1,32,256 --bits 4 --group-size 128

Each timing runs one program with a chain of products over several weights, together larger than the last-level
cache, so that weights come from memory as in a model. The candidates take turns; the best of all rounds counts.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.api import quantized_matmul
from pallas_kernels.packing import packed_words
from pallas_kernels.reference import dequantize_weight
from pallas_kernels.weight import PackedWeight

RESULTS = Path(__file__).parent / "results"
COLD_BYTES = 160 << 20
SMOLLM2_BLOCK = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
SMOLLM2_BLOCKS = 30

Product = Callable[[jax.Array, Any], jax.Array]


def random_weight(rng: np.random.Generator, d_in: int, d_out: int, bits: int, group_size: int) -> PackedWeight:
    group_rows = d_in if group_size == -1 else min(group_size, d_in)
    words = rng.integers(0, 2**32, (packed_words(d_in, bits), d_out), dtype=np.uint32)
    scales = rng.uniform(0.5, 1.0, (-(-d_in // group_rows), d_out)) / (2**bits * d_in**0.5)
    return PackedWeight(
        codes=jnp.array(words),
        scales=jnp.array(scales, jnp.float16),
        bits=bits,
        group_rows=group_rows,
        d_in=d_in,
    )


as_float = jax.jit(dequantize_weight)


def float_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight, precision="highest")


def chain(product: Product, x: jax.Array, weights: list[Any]) -> jax.Array:
    """Every product, none of which can begin before the one before it has ended."""
    total = jnp.zeros(())
    for weight in weights:
        d_in = weight.d_in if isinstance(weight, PackedWeight) else weight.shape[0]
        y = product(x[:, :d_in] + 1e-6 * total, weight)
        total = y[0, 0]
    return total


def compare(tokens: int, packed: list[PackedWeight], rounds: int, reference: bool) -> dict[str, dict[str, float]]:
    """Microseconds of each candidate for the whole chain, and the bytes of temporaries of its program."""
    d_in = max(weight.d_in for weight in packed)
    x = jnp.array(np.random.default_rng(1).normal(size=(tokens, d_in)), jnp.float32)
    floats = [as_float(weight) for weight in packed]
    candidates: dict[str, tuple[Product, list[Any]]] = {
        "float32": (float_product, floats),
        "xla_tiled": (partial(quantized_matmul, implementation="xla_tiled"), packed),
    }
    if reference:
        candidates["reference"] = (partial(quantized_matmul, implementation="reference"), packed)
    programs = {}
    for name, (product, weights) in candidates.items():
        started = time.perf_counter()
        program = jax.jit(partial(chain, product)).lower(x, weights).compile()
        programs[name] = (program, weights, time.perf_counter() - started)
        program(x, weights).block_until_ready()
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for name, (program, weights, _) in programs.items():
            started = time.perf_counter()
            program(x, weights).block_until_ready()
            best[name] = min(best[name], time.perf_counter() - started)
    return {
        name: {
            "us": 1e6 * best[name],
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "compile_seconds": seconds,
        }
        for name, (program, _, seconds) in programs.items()
    }


def measure(d_in: int, d_out: int, tokens: int, bits: int, group_size: int, rounds: int) -> dict[str, Any]:
    copies = max(2, min(30, -(-COLD_BYTES // (4 * d_in * d_out))))
    rng = np.random.default_rng(0)
    packed = [random_weight(rng, d_in, d_out, bits, group_size) for _ in range(copies)]
    timings = compare(tokens, packed, rounds, reference=True)
    return {
        "shape": f"{d_in}x{d_out}",
        "tokens": tokens,
        "float32_us": timings["float32"]["us"] / copies,
        "xla_tiled_us": timings["xla_tiled"]["us"] / copies,
        "reference_us": timings["reference"]["us"] / copies,
        "speedup": timings["float32"]["us"] / timings["xla_tiled"]["us"],
        "temporary_bytes": timings["xla_tiled"]["temporary_bytes"],
        "weights_in_turn": copies,
    }


def measure_model(bits: int, group_size: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = SMOLLM2_BLOCK * SMOLLM2_BLOCKS
    packed = [random_weight(rng, d_in, d_out, bits, group_size) for d_in, d_out in shapes]
    timings = compare(1, packed, rounds, reference=False)
    return {
        "shape": f"SmolLM2-135M, all {len(shapes)} projections",
        "tokens": 1,
        "float32_us": timings["float32"]["us"],
        "xla_tiled_us": timings["xla_tiled"]["us"],
        "reference_us": None,
        "speedup": timings["float32"]["us"] / timings["xla_tiled"]["us"],
        "temporary_bytes": timings["xla_tiled"]["temporary_bytes"],
        "weights_in_turn": len(shapes),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| d_in x d_out | tokens | float32 us | xla_tiled us | reference us | float32 / xla_tiled | temporaries MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = "" if row["reference_us"] is None else f"{row['reference_us']:.0f}"
        lines.append(
            f"| {row['shape']} | {row['tokens']} | {row['float32_us']:.0f} | {row['xla_tiled_us']:.0f} | "
            f"{reference} | {row['speedup']:.2f} | {row['temporary_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="576x576,576x192,576x1536,1536x576,4096x4096", help="d_in x d_out, ...")
    parser.add_argument("--tokens", default="1,8,32,256", help="rows of x, separated by commas")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-model", action="store_true", help="leave out the whole model's projections")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_matmul", help="writes OUT.json and OUT.md")
    options = parser.parse_args()

    load = round(os.getloadavg()[0], 1)
    rows = []
    for shape in options.shapes.split(","):
        d_in, d_out = map(int, shape.split("x"))
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(d_in, d_out, tokens, options.bits, options.group_size, options.rounds))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not options.no_model:
        rows.append(measure_model(options.bits, options.group_size, options.rounds))
    setting = {
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": True,
        "scales": "float16",
        "jax": jax.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": max(load, round(os.getloadavg()[0], 1)),  # above the cores' number: others ran beside this
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    heading = ", ".join(f"{name} {value}" for name, value in setting.items())
    text = f"# x @ packed weight on a CPU\n\n{heading}. Best of {options.rounds} rounds.\n\n{table(rows)}\n"
    options.out.with_suffix(".md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
