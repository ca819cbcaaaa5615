"""What the kernels need of JAX's versions and devices; nothing else here knows of them."""

import contextlib
from collections.abc import Iterator

import jax

from pallas_kernels.mosaic_gpu.layout import kernel_group_rows
from pallas_kernels.weight import Problem

OLDEST_JAX = (0, 11, 2)  # the first with plgpu.mma, and an interpreter that takes these kernels


def check(problem: Problem, capabilities: tuple[int, ...]) -> None:
    """Raise NotImplementedError, naming its limit, for a problem that a Mosaic kernel declines.

    Args:
        problem: its platform, its groups and the dtype of its activations are looked at.
        capabilities: major compute capabilities the kernel is written for.
    """
    if limit := _device_limit(problem, capabilities):
        raise NotImplementedError(limit)
    if kernel_group_rows(problem.group_rows, problem.d_in) is None:
        raise NotImplementedError(f"group_rows={problem.group_rows} is no multiple of 32 inputs.")


def _device_limit(problem: Problem, capabilities: tuple[int, ...]) -> str | None:
    if jax.__version_info__[:3] < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"jax {jax.__version__} is older than {oldest}, which its Mosaic GPU kernels need: upgrade jax."
    if problem.x_dtype not in ("bfloat16", "float16"):
        return f"activations are {problem.x_dtype}: it takes bfloat16 and float16."
    if interpreting():
        return None
    if problem.platform != "gpu":
        return f"platform {problem.platform!r} is no GPU."
    majors = " or ".join(f"{major}.x" for major in capabilities)
    if problem.capability is not None and problem.capability.split(".")[0] not in map(str, capabilities):
        return f"the GPU has compute capability {problem.capability}: it needs {majors}."
    return None


def device_kind() -> str:
    """The name of the GPU, by which tables of tilings are kept; "unknown" where none is at hand."""
    devices = [] if jax.default_backend() != "gpu" else jax.local_devices(backend="gpu")
    return devices[0].device_kind if devices else "unknown"


def interpreting() -> bool:
    """Whether kernels traced now will be interpreted on the CPU; part of the key of jit's caches."""
    from jax._src import config  # no public way to ask

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Interpret the kernels that are traced in this context, for tests without a GPU."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
