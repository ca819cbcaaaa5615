"""Time, compilation and memory of a piece of work inside a process that does more than that."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"  # one of those that JAX reports


@dataclass
class Measured:
    """Filled when the work ends; see `measured`."""

    seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured() -> Iterator[Measured]:
    """Measures the `with` block: wall time, what of it XLA compiled, and the most memory resident during it.

    The memory is told where the kernel can be asked to begin its count anew, which is so on Linux.
    """
    found = Measured()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILATION:
            found.compile_seconds += duration_secs

    begun = _reset_peak()
    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        jax.monitoring.unregister_event_duration_listener(listen)
        found.peak_bytes = _peak() if begun else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now
    except OSError:
        return False
    return _peak() is not None


def _peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None
