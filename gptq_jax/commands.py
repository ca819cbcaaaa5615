"""What commands begin with: a model opened, calibration read or written, a window's length, devices."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from gptq_jax.options import Dtype


def open_float(model: str, dtype: Dtype, arch_config: Path | None, *, whole: bool) -> Any:
    """A checkpoint that is read block by block; in memory what `save` wrote, or all if `whole`."""
    from gptq_jax.storage.checkpoint_source import open_checkpoint
    from gptq_jax.storage.load import load
    from gptq_jax.storage.store import is_store
    from gptq_jax.terminal import console, count_progress, escape

    if whole or (is_store(Path(model)) and arch_config is None):
        with console.status(f"loading {escape(model)}"):
            return load(model, dtype=str(dtype), arch_config=arch_config)
    with count_progress(f"checking {model}") as on_tensor:
        return open_checkpoint(model, dtype=str(dtype), arch_config=arch_config, on_tensor=on_tensor)


def runnable(
    model: str, dtype: Dtype, arch_config: Path | None = None, mesh: Any = None, adapter: Path | None = None
) -> Any:
    """The model, its packed weights as they run here, or cut over a mesh; with LoRA adapters, which no mesh cuts."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from gptq_jax.models.lora import with_lora
    from gptq_jax.models.prepared import prepare
    from gptq_jax.pipeline import is_quantized
    from gptq_jax.storage.load import load
    from gptq_jax.storage.peft import load_lora

    loaded = load(model, dtype=str(dtype), arch_config=arch_config, mesh=mesh)
    ready = prepare(loaded) if is_quantized(loaded) else loaded
    if adapter is None:
        return ready
    adapters = load_lora(adapter, loaded)
    return with_lora(
        ready, adapters if mesh is None else jax.device_put(adapters, NamedSharding(mesh, PartitionSpec()))
    )


def read_calibration(calibration: str) -> str | None:
    """The text of `--calibration`; None where the model is to write it."""
    from gptq_jax.calibration import read_text
    from gptq_jax.self_calibration import SELF
    from gptq_jax.terminal import console, escape

    if calibration == SELF:
        return None
    with console.status(f"reading {escape(calibration)}"):
        return read_text(calibration)


def calibration_windows(
    text: str | None,
    source: Any,
    model: str,
    dtype: Dtype,
    arch_config: Path | None,
    *,
    samples: int,
    length: int,
    seed: int,
    batch_size: int,
) -> Int32[np.ndarray, "samples length"]:
    """Windows of the text; None: that the model writes, for which it is in memory as a whole, and not afterwards."""
    from gptq_jax.calibration import sample_windows, token_stream
    from gptq_jax.models.base import Model
    from gptq_jax.self_calibration import self_windows
    from gptq_jax.storage.load import load
    from gptq_jax.terminal import console, count_progress, escape

    if text is not None:
        return sample_windows(token_stream(text, source.tokenizer), samples=samples, length=length, seed=seed)
    with console.status(f"loading {escape(model)}"):
        loaded = source if isinstance(source, Model) else load(model, dtype=str(dtype), arch_config=arch_config)
    with count_progress("writing calibration tokens") as show:
        return self_windows(loaded, samples=samples, length=length, seed=seed, batch_size=batch_size, on_token=show)


def windows_file(out: Path, source: Any, *, samples: int, length: int, seed: int) -> Path:
    """Where a run to `out` keeps what `source` writes; windows of other settings have another name."""
    from gptq_jax.models.identity import digest_json
    from gptq_jax.storage.directory import beside

    made_of = {"model": source.identity(), "samples": samples, "length": length, "seed": seed}
    return beside(out.resolve(), "unfinished") / f"windows-{digest_json(made_of)[:16]}.npy"


def put_windows(path: Path, windows: Int32[np.ndarray, "samples length"]) -> None:
    """Keep windows in a file, for `numpy.load`."""
    from gptq_jax.storage.directory import put_file

    content = io.BytesIO()
    np.save(content, windows)
    put_file(path, content.getvalue())


@contextmanager
def resumable(out: Path, kind: str, run: Mapping[str, Any], *, steps: str, restart: bool) -> Iterator[Any]:
    """The `Progress` of work that ends in the directory `out`, nobody else writing there; says what is kept.

    Args:
        out: the target, beside which `.OUT.KIND` lies.
        kind: what is done.
        run, steps, restart: as for `Progress`; the versions are added.
    """
    import jax

    from gptq_jax import __version__
    from gptq_jax.storage.directory import beside, locked
    from gptq_jax.storage.progress import Progress
    from gptq_jax.terminal import note

    run = {**run, "versions": {"gptq-jax": __version__, "jax": jax.__version__}}
    with locked(out.resolve()):
        progress = Progress(beside(out.resolve(), kind), run, steps=steps, restart=restart)
        if progress.done:
            note(f"going on with what an interrupted run left: {progress.done} {steps} are done")
        try:
            yield progress
        except KeyboardInterrupt:
            raise KeyboardInterrupt(progress.kept()) from None


def mesh_over(devices: int | None) -> Any:
    """The first devices of this process in a row, for `--tensor-parallel`; None for one, or where it was not given."""
    if devices in (None, 1):
        return None
    from gptq_jax.parallel import choose_devices
    from gptq_jax.storage.sharding import model_mesh

    try:
        return model_mesh(choose_devices(devices))
    except ValueError as error:
        raise ValueError(f"--tensor-parallel: {error}") from None


def window(length: int | None, context: int) -> int:
    """Tokens of a window: as asked, where the model can take so many."""
    if length is not None and length > context:
        raise ValueError(f"--length {length} is more than the model's context of {context} tokens.")
    return length or min(2048, context)
