"""Wall seconds by stage."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Clock:
    """Wall seconds by stage. `with clock("solve") as ready: ready(array)` waits for what the stage computes.

    Stages have their names in a profile too (`jax.profiler`).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[Any], Any]]:
        """Add the time of the `with` block to `stage`."""
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(stage):
                yield jax.block_until_ready
        finally:
            self.seconds[stage] += time.perf_counter() - start
