"""What commands begin with: a model opened, a window's length, devices."""

from pathlib import Path
from typing import Any

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
    """The model, its packed weights as they run here, or cut over the devices of a mesh; with LoRA adapters beside."""
    from gptq_jax.models.lora import with_lora
    from gptq_jax.models.prepared import prepare
    from gptq_jax.pipeline import is_quantized
    from gptq_jax.storage.load import load
    from gptq_jax.storage.peft import load_lora

    loaded = load(model, dtype=str(dtype), arch_config=arch_config, mesh=mesh)
    adapters = None if adapter is None else load_lora(adapter, loaded)
    ready = prepare(loaded) if is_quantized(loaded) else loaded
    return ready if adapters is None else with_lora(ready, adapters)


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
