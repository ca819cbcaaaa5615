"""Plan a quantization: what each grid would take on disk, to quantize and to run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Architecture, Model
from gptq_jax.planning.architecture import find_architecture
from gptq_jax.planning.memory import QuantizeMemory, RunMemory, quantize_memory, run_memory
from gptq_jax.planning.profile import DeviceProfile, profile_path, quantize_seconds, read_profile, tokens_per_second
from gptq_jax.planning.sizes import bits_per_weight, float_shapes, has_experts, largest_block, quantized_shapes
from gptq_jax.report import spec_label
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.load import PARAM_DTYPES
from gptq_jax.storage.store import tree_bytes

GRIDS = tuple(QuantSpec(bits=bits) for bits in (8, 4, 3, 2))


@dataclass(frozen=True, kw_only=True)
class PlannedGrid:
    """What one grid of all layers comes to.

    Attributes:
        grid: its name, or the dtype of the float model.
        bits_per_weight: of the linear layers, scales and zeros included.
        stored_bytes: of the arrays, in memory as in the store, where Orbax compresses them: codes by little, float32
            that was read from 16 bits by half.
        block_bytes: of the largest block.
        run: memory to generate text.
        quantize: memory to make it; None for the float model.
        devices: of `device_memory` to run it, weights and cache cut evenly; None where no memory is given, or
            one block and the activations exceed it.
        quantizes: a device of `device_memory` can quantize one block; None where no memory is given.
        quantize_seconds: on the device of the profile; None without one, for the float model, and for experts,
            since a config does not say how many of them a token meets.
        tokens_per_second: the most that the profile's memory bandwidth allows one device that holds it all; None
            without one, and for experts.
    """

    grid: str
    bits_per_weight: float
    stored_bytes: int
    block_bytes: int
    run: RunMemory
    quantize: QuantizeMemory | None
    devices: int | None
    quantizes: bool | None
    quantize_seconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found.

    Attributes:
        model: as it was named.
        parameters: numbers in all arrays of the float model.
        layers: blocks.
        dtype: of what stays float.
        samples, length, batch_size: of calibration; `length` is also what generation has room for.
        sequences: generated at a time.
        device_memory: bytes of one device, or None.
        platform: for which temporaries were compiled.
        profile: by which times were reckoned, or None.
        grids: the float model first.
    """

    model: str
    parameters: int
    layers: int
    dtype: str
    samples: int
    length: int
    batch_size: int
    sequences: int
    device_memory: int | None
    platform: str
    profile: DeviceProfile | None
    grids: tuple[PlannedGrid, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        for row, grid in zip(data["grids"], self.grids, strict=True):
            row["run"]["total"] = grid.run.total
            if grid.quantize is not None:
                row["quantize"]["total"] = grid.quantize.total
        return data


def plan(
    model: str | Model,
    grids: Sequence[QuantSpec | SpecRules] = GRIDS,
    *,
    dtype: str = "float32",
    samples: int = 128,
    length: int | None = None,
    batch_size: int = 8,
    sequences: int = 1,
    device_memory: int | None = None,
    profile: DeviceProfile | str | PathLike[str] | None = None,
) -> Plan:
    """Bytes, devices and time of a model at several grids, from its config: no weights are read.

    Args:
        model: what `find_architecture` takes, like "llama-2-70b", or a model.
        grids: of the linear layers.
        dtype: of what stays float: float32 or bfloat16.
        samples: calibration windows.
        length: tokens of a window, and of the text to generate; None for 2048, or the model's context.
        batch_size: calibration windows at a time.
        sequences: generated at a time.
        device_memory: bytes of one device.
        profile: of a device, or its file; None for this machine's, if it was ever measured.

    Raises:
        FileNotFoundError: there is no such model or profile.
        ValueError: an argument is out of range, a rule matches no layer, or `device_memory` cannot hold one block.
    """
    architecture = find_architecture(model) if isinstance(model, str) else model.config
    length = min(2048, architecture.context_length) if length is None else length
    settings = {"samples": samples, "length": length, "batch_size": batch_size, "sequences": sequences}
    _check(architecture, dtype, device_memory, settings)
    task = _Task(
        architecture=architecture,
        floats=float_shapes(architecture, dtype),
        dtype=dtype,
        **settings,
        device_memory=device_memory,
        profile=_profile(profile),
    )
    chosen = [grid if isinstance(grid, SpecRules) else SpecRules(default=grid) for grid in grids]
    rows = (task.float_row(), *(task.row(rules) for rules in chosen))
    _check_room(rows, device_memory)
    return Plan(
        model=model if isinstance(model, str) else type(architecture).__name__,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(task.floats)),
        layers=architecture.num_layers,
        dtype=dtype,
        **settings,
        device_memory=device_memory,
        platform=jax.default_backend(),
        profile=task.profile,
        grids=rows,
    )


@dataclass(frozen=True, kw_only=True)
class _Task:
    architecture: Architecture
    floats: Params
    dtype: str
    samples: int
    length: int
    batch_size: int
    sequences: int
    device_memory: int | None
    profile: DeviceProfile | None

    def float_row(self) -> PlannedGrid:
        """The model as it is."""
        return PlannedGrid(
            grid=self.dtype,
            bits_per_weight=8.0 * jnp.dtype(self.dtype).itemsize,
            **self._running(self.floats),
            quantize=None,
            quantizes=None,
            quantize_seconds=None,
        )

    def row(self, rules: SpecRules) -> PlannedGrid:
        """The model on the grids of `rules`."""
        params = quantized_shapes(self.architecture, rules, self.dtype)
        memory = quantize_memory(
            self.architecture,
            self.floats,
            params,
            samples=self.samples,
            length=self.length,
            batch_size=self.batch_size,
            dtype=self.dtype,
        )
        seconds = None
        if self.profile is not None and not has_experts(params):
            seconds = quantize_seconds(self.architecture, params, self.profile, self.samples * self.length)
        return PlannedGrid(
            grid=spec_label(rules.default) + (" and rules" if rules.skip or rules.overrides else ""),
            bits_per_weight=bits_per_weight(params),
            **self._running(params),
            quantize=memory,
            quantizes=None if self.device_memory is None else memory.block <= self.device_memory,
            quantize_seconds=seconds,
        )

    def _running(self, params: Params) -> dict[str, Any]:
        """The fields of a row that are about a model that is there."""
        run = run_memory(self.architecture, params, sequences=self.sequences, length=self.length, dtype=self.dtype)
        devices = speed = None
        if self.device_memory is not None:
            room = self.device_memory - run.activations
            devices = ceil((run.weights + run.cache) / room) if room >= largest_block(params) else None
        if self.profile is not None and not has_experts(params):
            tied = self.architecture.tie_embeddings
            speed = tokens_per_second(params, run.cache, self.profile, sequences=self.sequences, tied=tied)
        return {
            "stored_bytes": tree_bytes(params),
            "block_bytes": largest_block(params),
            "run": run,
            "devices": devices,
            "tokens_per_second": speed,
        }


def _profile(given: DeviceProfile | str | PathLike[str] | None) -> DeviceProfile | None:
    if isinstance(given, DeviceProfile):
        return given
    if given is not None:
        return read_profile(Path(given))
    return read_profile(profile_path()) if profile_path().is_file() else None


def _check(architecture: Architecture, dtype: str, device_memory: int | None, settings: dict[str, int]) -> None:
    if dtype not in PARAM_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use {' or '.join(PARAM_DTYPES)}.")
    for name, value in (*settings.items(), ("device_memory", device_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive.")
    if settings["length"] > architecture.context_length:
        raise ValueError(
            f"length={settings['length']} is more than the model's context of {architecture.context_length} tokens."
        )


def _check_room(rows: Sequence[PlannedGrid], device_memory: int | None) -> None:
    """Raise ValueError where no grid leaves room for one block on a device."""
    if device_memory is None or any(row.devices for row in rows):
        return
    least = min(rows, key=lambda row: row.block_bytes + row.run.activations)
    raise ValueError(
        f"device_memory={device_memory / 1e6:.1f} MB cannot hold one block: at {least.grid} it has "
        f"{least.block_bytes / 1e6:.1f} MB, and its activations take {least.run.activations / 1e6:.1f} MB more."
    )
