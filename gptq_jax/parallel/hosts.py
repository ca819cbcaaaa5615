"""Several processes as one, on one host or many: JAX's distributed engine, and what only the first of them does."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptq_jax.parallel.data import AXIS, make_mesh, place

AUTO = "auto"
CONNECT_SECONDS = 120  # until all processes have come
SILENT_SECONDS = 20  # without a sign of life, after which the others take a process for dead, and stop

Result = TypeVar("Result")


def join(coordinator: str | None, process_id: int | None = None, processes: int | None = None) -> None:
    """Make this process one of several, whose devices `jax.devices()` lists together. Nothing without `coordinator`.

    Every process runs the same program on the same input. When one dies, the others stop with an error.

    Args:
        coordinator: HOST:PORT of the first process, the same for all; "auto": as JAX finds it out under Slurm, Open
            MPI, GKE, or on a TPU pod.
        process_id: 0 to `processes` - 1; not with "auto".
        processes: how many there are; not with "auto".

    Raises:
        ValueError: arguments that do not fit one another.
        RuntimeError: the others did not come, or "auto" finds no cluster.
    """
    given = {"--process-id (process_id)": process_id, "--processes (processes)": processes}
    if coordinator is None:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} is given without --coordinator (coordinator): give HOST:PORT, or auto.")
        return
    if coordinator == AUTO:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} is given, but --coordinator auto finds it out: leave it away.")
        coordinator = None
    else:
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[^\]]+\]:\d{1,5}", coordinator):
            raise ValueError(f"--coordinator {coordinator!r} is no HOST:PORT: give one like 10.0.0.1:1234, or auto.")
        if process_id is None or processes is None:
            missing = next(name for name, value in given.items() if value is None)
            raise ValueError(f"{missing} is missing: give each process its number, and how many there are.")
        if not 0 <= process_id < processes:
            raise ValueError(
                f"--process-id {process_id} is not one of 0 to {processes - 1}, of --processes {processes}."
            )
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process_id,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=SILENT_SECONDS,
            shutdown_timeout_seconds=SILENT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"the processes could not join: {reason}") from error


def is_first() -> bool:
    """Whether this is the only process, or the first."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Result]) -> Result:
    """What `function` returns on the first process, for all: plain data. All wait for it; it runs nowhere else.

    Raises:
        Exception: what `function` raised; ValueError with its message on the others.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            outcome = {"result": function()}
        except Exception as error:
            failure, outcome = error, {"error": str(error)}
    outcome = json.loads(_from_first(json.dumps(outcome)))
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["result"]


def _from_first(text: str) -> str:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = np.frombuffer(text.encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(content.size)))
    padded = content if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(broadcast_one_to_all(padded))).decode()


def wait_for_all(what: str) -> None:
    """Go on when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(what)


def spread(tree: Any) -> Any:
    """Arrays that every process has, each cut over all devices along its last axis that they divide."""
    mesh = make_mesh(jax.devices())

    def cut(leaf: Any) -> jax.Array:
        axis = next((axis for axis in reversed(range(leaf.ndim)) if leaf.shape[axis] % mesh.size == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
        return place(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(cut, tree)
