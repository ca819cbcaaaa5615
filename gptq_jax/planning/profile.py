"""How fast this device is, measured once and kept, and what that makes of a plan."""

import json
import math
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.bench.timing import device_kind, measure_yardstick
from gptq_jax.cache import cache_directory
from gptq_jax.hooks.nnx import Params
from gptq_jax.methods.gptq import gptq_solve
from gptq_jax.models.base import Architecture, input_groups
from gptq_jax.planning.memory import kernel_of
from gptq_jax.storage.store import tree_bytes
from gptq_jax.stream import STREAMED_BYTES
from gptq_jax.tensor import QuantizedTensor

_SOLVED = 2048  # d_in and d_out of the layer whose solving is timed


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What one device was measured to do.

    Attributes:
        device: its name.
        jax: the version that was measured.
        measured: the day, as ISO 8601.
        dtype: of the matrix product.
        flops_per_second: of a large matrix product.
        bytes_per_second: read and written by a copy.
        solve_flops_per_second: of GPTQ on one layer, by the count of `solve_flops`.
    """

    device: str
    jax: str
    measured: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    solve_flops_per_second: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{field.name}={value!r} must be a positive number.")
            if field.type is str and not isinstance(value, str):
                raise ValueError(f"{field.name}={value!r} must be a string.")


def profile_path() -> Path:
    """Where the profile of this process's device is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", device_kind().lower()).strip("-")
    return cache_directory() / f"profile-{name}.json"


def measure_profile(*, size: int | None = None) -> DeviceProfile:
    """Time this device: half a minute on a processor.

    Args:
        size: of the matrices and the layer; None for what gives the full rate.
    """
    yardstick = measure_yardstick("float32", size=size, copy_bytes=None if size is None else 4 * size * size)
    side = size or _SOLVED
    keys = jax.random.split(jax.random.key(0))
    weight, x = (jax.random.normal(key, (side, side), jnp.float32) for key in keys)
    hessian = jax.block_until_ready(jnp.matmul(x.T, x))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(gptq_solve(weight, hessian).codes)
        seconds.append(time.perf_counter() - start)
    return DeviceProfile(
        device=device_kind(),
        jax=jax.__version__,
        measured=date.today().isoformat(),
        dtype="float32",
        flops_per_second=yardstick.flops_per_second,
        bytes_per_second=yardstick.bytes_per_second,
        solve_flops_per_second=solve_flops(side, side) / statistics.median(seconds[1:]),
    )


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """Write a profile as JSON; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    os.replace(partial, path)


def read_profile(path: Path) -> DeviceProfile:
    """What `write_profile` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no profile.
    """
    try:
        data: Any = json.loads(path.read_text())
        return DeviceProfile(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no device profile ({error}): measure it again with --measure.") from None


def solve_flops(d_in: int, d_out: int) -> int:
    """Operations of GPTQ on a layer: the factor of its Hessian, and two passes over the weights before each row."""
    return d_in**3 // 3 + 2 * d_in**2 * d_out


def quantize_seconds(architecture: Architecture, packed: Params, profile: DeviceProfile, tokens: int) -> float:
    """Forward passes, Hessians, solving and measuring, on one device; attention and rounding are left out.

    Args:
        architecture: of the model.
        packed: its parameters once quantized, of shapes.
        profile: of the device.
        tokens: of all calibration windows.
    """
    products = solving = 0.0
    for index, block in enumerate(packed["layers"]):
        earlier = kept = 0.0
        for group in input_groups(architecture, architecture.layer_kind(index)):
            kernels = [kernel_of(block, path) for path in group]
            weights = sum(math.prod(kernel.shape) for kernel in kernels)
            d_in, d_out = kernels[0].shape[-2], weights // kernels[0].shape[-2]
            products += 2.0 * tokens * weights
            if isinstance(kernels[0], QuantizedTensor):
                # Inputs that were not kept are computed from the start of the block.
                kept += 4.0 * tokens * d_in
                products += 2.0 * tokens * earlier * max(0.0, 1 - STREAMED_BYTES / kept)
                products += 2.0 * tokens * d_in**2 + 3 * 2.0 * d_in**2 * d_out
                solving += solve_flops(d_in, d_out)
            earlier += weights
    return products / profile.flops_per_second + solving / profile.solve_flops_per_second


def tokens_per_second(params: Params, cache: int, profile: DeviceProfile, *, sequences: int, tied: bool) -> float:
    """The most that one device could generate: everything that a token needs is read once.

    Args:
        params: of shapes.
        cache: bytes of the key-value cache.
        profile: of the device.
        sequences: generated at a time.
        tied: the head reads the embedding, of which otherwise a row is read.
    """
    read = tree_bytes(params) - (0 if tied else tree_bytes(params["embed"])) + cache
    return sequences * profile.bytes_per_second / read
