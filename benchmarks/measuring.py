"""What the benchmarks share: child processes that take turns, clocks, the machine, tables. Standard library only,
so that a child in another tool's environment can import it.
"""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[dict[str, float], Result]:
    """{"wall": seconds, "cpu": seconds of all threads of this process}, and what `function` returned."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def summarize(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Minimum and median of each clock: {"wall_min", "wall_median", "cpu_min", "cpu_median"}."""
    summary = {}
    for clock in ("wall", "cpu"):
        values = [timing[clock] for timing in timings]
        summary[f"{clock}_min"], summary[f"{clock}_median"] = min(values), statistics.median(values)
    return summary


class Child:
    """A child process that answers JSON requests, one at a time; what it prints goes to a log."""

    def __init__(self, command: Sequence[str | Path], threads: int | None = None) -> None:
        self.name = Path(command[1]).name
        environment = dict(os.environ)
        repository = str(Path(__file__).resolve().parents[1])
        if threads:
            environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
        if Path(command[0]) == Path(sys.executable):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, environment.get("PYTHONPATH")]))
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by __exit__)
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to `request`, or RuntimeError with the end of the child's log."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-25:])
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}:\n{tail}")
        return json.loads(answer)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()  # the child's loop ends with its input
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def serve(handlers: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """A child's loop: each request's "do" names the handler, the rest are its arguments.

    Args:
        handlers: called once, after which nothing printed can be taken for an answer; does the heavy imports.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    table = handlers()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(table[request.pop("do")](**request)), file=answers, flush=True)


def pin(threads: int) -> None:
    """Keep this process on the first `threads` of the CPUs it may use; before libraries count them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, available_cpus()[:threads])


def available_cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def resident_bytes() -> int:
    """What of this process is in memory now (Linux), else its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most bytes of this process that have been in memory."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def setting(**more: Any) -> dict[str, Any]:
    """When, on what and by which command a figure was taken; `more` is added."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
        "processor": processor(),
        "cores": len(available_cpus()),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "platform": platform.platform(),
        "load_before": round(load, 2),
        "versions": versions("gptq-jax", "jax", "jaxlib", "flax", "numpy"),
        **more,
    }


def command() -> str:
    """This process's command line, with the name alone where an argument is an absolute path."""
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; None is an empty cell, floats are shown with three digits that count."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def write(out: Path, title: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], text: str) -> None:
    """Write OUT.json (setting and rows) and OUT.md (title, setting, `text`), making the directory."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"setting": about, "rows": rows}, indent=1)
    out.with_name(out.name + ".json").write_text(data + "\n")
    lines = [f"- {name}: {_plain(value)}" for name, value in about.items()]
    out.with_name(out.name + ".md").write_text(f"# {title}\n\n{text}\n\n" + "\n".join(lines) + "\n")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
