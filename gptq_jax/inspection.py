"""What is in a model, without reading its weights."""

import math
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from gptq_jax.matmul import explain
from gptq_jax.models.fields import DecoderFields
from gptq_jax.report import expert_lines, spec_label
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.load import open_source, read_architecture
from gptq_jax.storage.packed.detect import packed_format
from gptq_jax.storage.packed.read import describe_packed
from gptq_jax.storage.parameters import leaves_of
from gptq_jax.storage.store import is_store, read_shapes, tree_bytes
from gptq_jax.tensor import QuantizedTensor


def inspect_model(model: str, arch_config: str | PathLike[str] | None = None) -> dict[str, Any]:
    """Layers with shape, grid, bytes, bits per weight, reported loss, and the implementations that run each.

    Args:
        model: anything `load` takes.
        arch_config: as for `load`.

    Returns:
        Plain data; `layers` are the matrices of every block, and the output head where it is packed. `format`
        names a packed format, its version and what is `unusual` in the checkpoint; None for others. `rotated_inputs`
        is the layer of every block whose input is rotated as the model runs; None where there is none.

    Raises:
        OSError, ValueError: as `load`.
    """
    path = Path(model)
    packed, report = None, None
    if is_store(path) and arch_config is None:
        config, params, report = read_shapes(path)
        kind = "gptq-jax store"
    else:
        source = open_source(model, arch_config)
        config = read_architecture(source)
        if (checkpoint := packed_format(source)) is not None:
            params, unusual = describe_packed(checkpoint, config)
            packed = {"name": checkpoint.format.name, "version": checkpoint.format.version, "unusual": unusual}
            kind = f"{checkpoint.format.name} checkpoint"
        else:
            leaves_of(source, config)  # the number of layers is believable
            params = config.abstract_params()
            kind = source.format
    measured = {layer["path"]: layer for layer in (report or {}).get("layers", [])}
    layers = [_layer(name, leaf, measured) for name, leaf in _kernels(params)]
    quantized = [layer for layer in layers if layer["spec"] is not None]
    weights = sum(math.prod(layer["shape"]) for layer in quantized)
    return {
        "model": model,
        "kind": kind,
        "format": packed,
        "rotated_inputs": (config.names.down if isinstance(config, DecoderFields) and config.rotated_down else None),
        "layers": layers,
        "bytes": tree_bytes(params),
        "quantized_layers": len(quantized),
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in quantized) / weights if weights else None,
        "kept_float": (report or {}).get("kept_float", {}),
        "settings": (report or {}).get("settings", {}),
    }


def _kernels(params: Any) -> list[tuple[str, Any]]:
    """Kernels by the path of their layer: of all blocks and a packed head, or what a user's own module has packed."""
    own = "layers" not in params
    leaves = jax.tree_util.tree_leaves_with_path(
        params["params"] if own else params["layers"], is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
    )
    found = []
    for key, leaf in leaves:
        name = ("" if own else "layers.") + jax.tree_util.keystr(key, simple=True, separator=".")
        if isinstance(leaf, QuantizedTensor) if own else name.endswith(".kernel"):
            found.append((name.removesuffix(".kernel"), leaf))
    head = None if own else params["head"].get("lm_head", {}).get("kernel")
    return [*found, ("head.lm_head", head)] if isinstance(head, QuantizedTensor) else found


def _layer(name: str, leaf: Any, measured: dict[str, Any]) -> dict[str, Any]:
    packed = isinstance(leaf, QuantizedTensor)
    found = measured.get(name, {})
    nbytes = leaf.nbytes if packed else leaf.size * leaf.dtype.itemsize
    return {
        "path": name,
        "shape": list(leaf.shape),
        "spec": _fields(leaf.spec) if packed else None,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / leaf.size if not packed else leaf.bits_per_weight,
        "method": found.get("method"),
        "loss": found.get("loss"),
        "rtn_loss": found.get("rtn_loss"),
        "relative_error": found.get("relative_error"),
        "damping": found.get("damping"),
        "fell_back": found.get("fell_back", False),
        "experts": found.get("experts"),
        "implementations": explain(leaf, tokens=1, x_dtype=jnp.float32) if packed else {"xla": "runs"},
    }


def _fields(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}


def inspection_table(result: dict[str, Any]) -> list[Table | str]:
    """What `inspect_model` found, for a terminal of 80 columns: a table between lines of plain text."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    # Every path starts with "layers.", which stands once, at the head of its column.
    for name in ("layers.", "shape", "grid", "loss", "rel. error", "runs"):
        table.add_column(name, justify="left" if name in ("layers.", "grid", "runs") else "right", no_wrap=True)
    declined: dict[str, str] = {}
    for layer in result["layers"]:
        answers = layer["implementations"]
        runs = next((name for name, answer in answers.items() if answer == "runs"), "nothing")
        declined |= {name: answer for name, answer in answers.items() if answer != "runs"}
        label = spec_label(QuantSpec(**layer["spec"])) if layer["spec"] else "float"
        table.add_row(
            escape(layer["path"].removeprefix("layers.")),
            "x".join(map(str, layer["shape"])),
            label,
            "" if layer["loss"] is None else f"{layer['loss']:.2e}",
            "" if layer["relative_error"] is None else f"{layer['relative_error']:.4f}",
            runs,
        )
    lines: list[Table | str] = [f"{result['model']}: {result['kind']}", table]
    rounded = [layer["path"] for layer in result["layers"] if layer["fell_back"]]
    if rounded:
        lines.append(f"could not be solved and were rounded to nearest: {', '.join(rounded)}")
    lines += expert_lines(result["layers"])
    if result["format"] is not None:
        lines.append(f"format: {result['format']['name']}, version {result['format']['version']}")
        lines += [f"unusual: {note}" for note in result["format"]["unusual"]]
    if result["rotated_inputs"] is not None:
        lines.append(f"inputs of {result['rotated_inputs']} are rotated as the model runs (hadamard_online)")
    lines += [f"left float ({reason}): {path}" for path, reason in result["kept_float"].items()]
    lines += [f"{name} declines: {reason}" for name, reason in declined.items()]
    if result["bits_per_weight"] is not None:
        lines.append(
            f"{result['quantized_layers']} of {len(result['layers'])} layers quantized, "
            f"{result['bits_per_weight']:.3f} bits per weight"
        )
    lines.append(f"{result['bytes'] / 1e6:.1f} MB in all")
    return lines
