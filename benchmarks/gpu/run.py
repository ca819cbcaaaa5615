"""All GPU checks and benchmarks of README.md, within 8 minutes.

    python benchmarks/gpu/run.py --out benchmarks/results

Writes <device>.json after every row, so that a run that is cut short keeps what it has, and <device>.md at its
end. A failure is recorded, and the run goes on. `--tiny` runs all of it on small shapes, on any machine.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
from items import FULL, ITEMS, TINY, Context, Rows, told, yardstick

from gptq_jax.bench.timing import device_kind


class Results:
    """What was found so far, on disk after every change."""

    def __init__(self, out: Path, about: dict[str, Any]):
        name = re.sub("[^a-z0-9]+", "_", device_kind().lower()).strip("_")
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / f"{name}.json"
        self.data: dict[str, Any] = {"setting": about, "items": {}}

    def start(self, item: str) -> dict[str, Any]:
        """A record for an item, unfinished until it says otherwise."""
        record: dict[str, Any] = {"status": "cut short", "rows": []}
        self.data["items"][item] = record
        self.write()
        return record

    def write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.file)

    def table(self) -> Path:
        """Write the same as Markdown."""
        lines = [f"# GPU checks on {self.data['setting']['device']}", ""]
        lines += [f"- {name}: {_plain(value)}" for name, value in self.data["setting"].items()]
        for item, record in self.data["items"].items():
            lines += ["", f"## {item}", "", f"{record['status']}, {record.get('seconds', 0):.1f} s", ""]
            names = list(dict.fromkeys(name for row in record["rows"] for name in row))
            rows = [[_plain(row.get(name)) for name in names] for row in record["rows"]]
            lines += [measuring.table(names, rows)] if rows else []
        path = self.file.with_suffix(".md")
        path.write_text("\n".join(lines) + "\n")
        return path


def run_items(results: Results, context: Context, only: list[str], deadline: float) -> None:
    """Every item in turn, each within its share of the time that is left."""
    for name, function, share in ITEMS:
        if only and name not in only:
            continue
        record, start = results.start(name), time.monotonic()
        left = deadline - start
        if left <= 0:
            record["status"] = "skipped: no time left"
        else:
            try:
                record["status"] = _collect(results, record, function(context), start + share * left)
            except Exception as error:  # recorded, so that the others still run
                record["status"] = f"failed: {told(error)}"
        record["seconds"] = time.monotonic() - start
        results.write()
        print(f"{name}: {record['status']}, {len(record['rows'])} rows, {record['seconds']:.1f} s", flush=True)


def _collect(results: Results, record: dict[str, Any], rows: Rows | Iterator[dict[str, Any]], until: float) -> str:
    for row in rows:
        record["rows"].append(row)
        results.write()
        if time.monotonic() > until:
            return "stopped at its share of the time; the rows below are whole"
    failed = sum("failed" in row or row.get("met") is False for row in record["rows"])
    return f"done, {failed} rows failed or short of their target" if failed else "done"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(_plain(entry)) for entry in value)
    return str(value).replace("|", "/") if isinstance(value, str | bool) else value


def _command() -> str:
    return measuring.command().replace("benchmarks/run.py", "benchmarks/gpu/run.py")


def main() -> None:
    names = [name for name, _, _ in ITEMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS, help="the directory to write to")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further row is begun")
    parser.add_argument("--only", default="", help=f"items, separated by commas: {','.join(names)}")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that everything runs")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(only) - set(names)):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(names)}")
    deadline = time.monotonic() + 60 * options.minutes
    scale = TINY if options.tiny else FULL
    about = measuring.setting(device=device_kind(), tiny=options.tiny) | {"command": _command()}
    results = Results(options.out, about)
    results.write()
    found = yardstick(scale)
    about["yardstick"] = vars(found)
    results.write()
    print(f"{found.device}: {found.bytes_per_second / 1e9:.0f} GB/s, {found.flops_per_second / 1e12:.3g} TFLOP/s")
    run_items(results, Context(scale, found), only, deadline)
    print(f"wrote {results.file} and {results.table()}")


if __name__ == "__main__":
    main()
