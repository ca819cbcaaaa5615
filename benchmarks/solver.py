"""Times the GPTQ solver against one n^3 matrix product and, where its Python is given, against GPTQModel's on the CPU.

    python benchmarks/solver.py --peer-python /path/to/peer/bin/python
    python benchmarks/solver.py --sizes 2048 --threads 2          # without the peer

One synthetic n x n weight and Hessian goes to both sides, each in a child process with the same threads on the same
CPUs; they take turns (ours, theirs, ours, ...), so that drift of the machine falls on both. What is timed begins with
the weight and the Hessian in memory and ends with codes and scales: permutation, damping, factorization, rounding.
The losses tr(D^T H D) / outputs are computed here, in float64, from what both return.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, Child, available_cpus, setting, summarize, table, write

# Ours -> the options of both sides. "default" is what this library does when nothing is said: the peer has no
# such grid, so that it is held against the peer's activation order.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "natural": (
        {"order": "natural", "static_groups": False, "grid": "minmax"},
        {"desc_act": False, "static_groups": False},
    ),
    "activation": (
        {"order": "activation", "static_groups": True, "grid": "minmax"},
        {"desc_act": True, "static_groups": True},
    ),
    "activation, dynamic groups": (
        {"order": "activation", "static_groups": False, "grid": "minmax"},
        {"desc_act": True, "static_groups": False},
    ),
    "default": (
        {"order": "activation", "static_groups": True, "grid": "ldl"},
        {"desc_act": True, "static_groups": True},
    ),
}
DAMPING = 0.01


def synthetic_layer(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A float32 weight [outputs, inputs], the Hessian 2/T X^T X of T correlated inputs with outlier channels, and T."""
    rng = np.random.default_rng(seed)
    tokens = 2 * n
    spectrum = np.sqrt(np.arange(1, n + 1, dtype=np.float32) ** -1.0)
    mixing = np.linalg.qr(rng.standard_normal((n, n), dtype=np.float32))[0]
    inputs = (rng.standard_normal((tokens, n), dtype=np.float32) * spectrum) @ mixing
    inputs += 0.02 * rng.standard_normal((tokens, n), dtype=np.float32) * inputs.std()
    inputs *= np.exp(0.5 * rng.standard_normal(n)).astype(np.float32)
    inputs[:, rng.choice(n, max(1, n // 256), replace=False)] *= 15
    weight = rng.standard_normal((n, n), dtype=np.float32) * np.float32(0.02)
    weight *= (1 + rng.exponential(0.3, n)).astype(np.float32)
    return weight, 2 / tokens * inputs.T @ inputs, tokens


def loss(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """tr(D H D^T) / outputs of D = weight - quantized [outputs, inputs]."""
    error = weight.astype(np.float64) - quantized.astype(np.float64)
    return float(np.sum((error @ hessian.astype(np.float64)) * error) / len(weight))


def round_to_nearest(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """`weight` on the minmax grid of both sides, for scale: what a solver must beat."""
    outputs, n = weight.shape
    grouped = np.pad(weight, ((0, 0), (0, -n % group))).reshape(outputs, -1, group)
    top = 2**bits - 1
    if symmetric:
        scale = 2 * np.abs(grouped).max(-1, keepdims=True) / top
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = np.minimum(grouped.min(-1, keepdims=True), 0), np.maximum(grouped.max(-1, keepdims=True), 0)
        scale = (high - low) / top
        zero = np.round(-low / scale)
    codes = np.clip(np.round(grouped / scale) + zero, 0, top)
    return ((codes - zero) * scale).reshape(outputs, -1)[:, :n]


def measure(
    ours: Child,
    peer: Child | None,
    n: int,
    symmetric: bool,
    cases: list[str],
    options: argparse.Namespace,
    folder: Path,
) -> list[dict[str, Any]]:
    """Rows of all cases for the layer that both children hold."""
    with np.load(folder / f"{n}.npz") as layer:
        weight, hessian, tokens = layer["weight"], layer["hessian"], int(layer["tokens"])
    spec = {"bits": options.bits, "group_size": options.group_size, "symmetric": symmetric}
    peer_grid = {"bits": options.bits, "group_size": options.group_size, "sym": symmetric}
    nearest = loss(weight, round_to_nearest(weight, options.bits, options.group_size, symmetric), hessian)
    rows = []
    for case in cases:
        ours_options = {**CASES[case][0], "damping": DAMPING}
        peer_config = {**peer_grid, **CASES[case][1], "damp_percent": DAMPING, "mse": 0.0}
        file = folder / "quantized.npy"
        first = ours.ask(do="solve", spec=spec, options=ours_options, save=str(file))
        row: dict[str, Any] = {
            "n": n,
            "symmetric": symmetric,
            "case": case,
            "ours_first_call": {clock: first[clock] for clock in ("wall", "cpu")},
            "ours_loss": loss(weight, np.load(file), hessian),
            "nearest_loss": nearest,
            "ours_damping": first["damping"],
            "ours_fell_back": first["fell_back"],
        }
        if peer:
            warm = peer.ask(do="solve", config=peer_config, tokens=tokens, save=str(file))
            row |= {
                "peer_loss": loss(weight, np.load(file), hessian),
                "peer_damping": warm["damping"],
                "peer_fell_back": warm["fell_back"],
            }
        ours.ask(do="matmul")
        timings: dict[str, list[dict[str, float]]] = {"matmul": [], "ours": [], "peer": []}
        for _ in range(options.repeat):
            timings["matmul"].append(ours.ask(do="matmul"))
            timings["ours"].append(ours.ask(do="solve", spec=spec, options=ours_options))
            if peer:
                timings["peer"].append(peer.ask(do="solve", config=peer_config, tokens=tokens))
        row |= {name: summarize(each) for name, each in timings.items() if each}
        row["samples"] = {
            name: [{clock: timing[clock] for clock in ("wall", "cpu")} for timing in each]
            for name, each in timings.items()
        }
        row |= {
            "times_matmul_wall": row["ours"]["wall_median"] / row["matmul"]["wall_median"],
            "times_matmul_cpu": row["ours"]["cpu_median"] / row["matmul"]["cpu_median"],
        }
        if peer:
            row |= {
                "faster_wall": row["peer"]["wall_median"] / row["ours"]["wall_median"],
                "faster_cpu": row["peer"]["cpu_median"] / row["ours"]["cpu_median"],
                "loss_ratio": row["ours_loss"] / row["peer_loss"],
            }
        rows.append(row)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The tables of speed and of losses."""
    cells, losses = [], []
    for row in rows:
        what = [row["threads"], row["n"], "symmetric" if row["symmetric"] else "asymmetric", row["case"]]
        peer = row.get("peer")
        cells.append(
            [
                *what,
                f"{row['ours']['wall_min']:.3f} / {row['ours']['wall_median']:.3f}",
                f"{row['ours']['cpu_min']:.3f} / {row['ours']['cpu_median']:.3f}",
                row["ours_first_call"]["wall"],
                f"{row['matmul']['wall_median']:.3f} / {row['matmul']['cpu_median']:.3f}",
                f"{row['times_matmul_wall']:.2f} / {row['times_matmul_cpu']:.2f}",
                peer and f"{peer['wall_min']:.3f} / {peer['wall_median']:.3f}",
                peer and f"{peer['cpu_min']:.3f} / {peer['cpu_median']:.3f}",
                peer and f"{row['faster_wall']:.1f} / {row['faster_cpu']:.1f}",
            ]
        )
        losses.append(
            [
                *what,
                f"{row['ours_loss']:.6g}",
                f"{row['peer_loss']:.6g}" if peer else None,
                f"{row['loss_ratio']:.5f}" if peer else None,
                f"{row['ours_loss'] / row['nearest_loss']:.4f}",
                f"{row['ours_damping']:g}" + (" FELL BACK" if row["ours_fell_back"] else ""),
                f"{row['peer_damping']:g}" + (" FELL BACK" if row["peer_fell_back"] else "") if peer else None,
            ]
        )
    what = ["threads", "n", "grid", "case"]
    speed = table(
        [
            *what,
            "ours wall s (min / median)",
            "ours CPU s (min / median)",
            "ours first call s",
            "one n^3 product s (wall / CPU)",
            "ours in products (wall / CPU)",
            "GPTQModel wall s (min / median)",
            "GPTQModel CPU s (min / median)",
            "GPTQModel / ours (wall / CPU)",
        ],
        cells,
    )
    headings = ["ours", "GPTQModel", "ours / GPTQModel", "ours / rounding", "ours damping", "GPTQModel damping"]
    return f"## Time\n\nRatios are of medians.\n\n{speed}\n\n## Loss\n\ntr(D^T H D) / outputs.\n\n" + table(
        [*what, *headings], losses
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with GPTQModel; see README.md")
    parser.add_argument("--sizes", default="2048,4096", help="n, separated by commas")
    parser.add_argument("--threads", default="1,2", help="threads of both sides, separated by commas")
    parser.add_argument("--grids", default="symmetric,asymmetric")
    parser.add_argument("--cases", default=";".join(CASES), help='separated by ";": ' + "; ".join(CASES))
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3, help="timings of each side and case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "solver", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    cases = [case.strip() for case in options.cases.split(";")]
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: no case {sorted(unknown)}; there are {list(CASES)}.")
    threads = [int(count) for count in options.threads.split(",")]
    if max(threads) > len(available_cpus()):
        parser.error(f"--threads: {max(threads)} is more than the {len(available_cpus())} CPUs there are.")
    # Not resolved: a virtual environment's python is a link, and finds its packages by the place of the link.
    if options.peer_python and not options.peer_python.is_file():
        parser.error(f"--peer-python: {options.peer_python} does not exist.")

    here = Path(__file__).parent
    about = setting(bits=options.bits, group_size=options.group_size, damping=DAMPING, repeat=options.repeat)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = [int(size) for size in options.sizes.split(",")]
        for n in sizes:
            weight, hessian, tokens = synthetic_layer(n, options.seed)
            np.savez(folder / f"{n}.npz", weight=weight, hessian=hessian, tokens=tokens)
        for count in threads:
            with ExitStack() as stack:
                ours = stack.enter_context(Child([sys.executable, here / "solver_ours.py", str(count)], threads=count))
                peer = None
                if options.peer_python:
                    child = Child([options.peer_python, here / "solver_gptqmodel.py", str(count)], threads=count)
                    peer = stack.enter_context(child)
                    about["peer_versions"] = {k: v for k, v in peer.ask(do="hello").items() if k != "threads"}
                ours.ask(do="hello")
                for n in sizes:
                    for child in filter(None, (ours, peer)):
                        child.ask(do="take", path=str(folder / f"{n}.npz"))
                    for grid in options.grids.split(","):
                        new = measure(ours, peer, n, grid == "symmetric", cases, options, folder)
                        rows += [{"threads": count, **row} for row in new]
                        for row in rows[-len(new) :]:
                            print(_line(row), flush=True)
                        # After each part, so that a run that is cut short leaves what it has.
                        write(options.out, "The solver on a CPU", about, rows, render(rows))
    print(f"\n{render(rows)}\n\nwrote {options.out}.json and .md")


def _line(row: dict[str, Any]) -> str:
    text = f"{row['threads']} threads, {row['n']}, {'sym' if row['symmetric'] else 'asym'}, {row['case']}: "
    text += f"{row['ours']['wall_median']:.3f} s = {row['times_matmul_wall']:.2f} products"
    if "peer" in row:
        text += f", GPTQModel {row['peer']['wall_median']:.3f} s, loss ratio {row['loss_ratio']:.5f}"
    return text


if __name__ == "__main__":
    main()
