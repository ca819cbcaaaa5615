"""compressed-tensors' `pack-quantized` format, as llm-compressor writes it and vLLM and transformers load it."""

import re
from dataclasses import replace
from typing import Any

from gptq_jax.models.base import Model
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.export.base import Modules, Plan, encode_all, grid_of, modules, most_common_spec, packed_bytes
from gptq_jax.storage.packed.compressed_tensors import encode
from gptq_jax.tensor import QuantizedTensor

HEAD = "lm_head"


def plan(model: Model, dtype: str) -> Plan:
    """Packed modules as weight_packed, weight_scale, weight_shape and weight_zero_point; the rest in `dtype`.

    Raises:
        ValueError: the model is not quantized, or naming every module that the format cannot hold.
    """
    found = modules(model)
    most_common_spec(found.packed)
    packed = encode_all(found.packed, encode)

    def tensors() -> Any:
        yield from found.float_tensors(dtype)
        yield from packed()

    return Plan(tensors, quantization_config(found), packed_bytes(found, dtype))


def quantization_config(found: Modules) -> dict[str, Any]:
    """One group of modules for each grid; where there is one grid, it is that of every linear layer not ignored."""
    by_grid: dict[QuantSpec, list[str]] = {}
    for name, tensor in found.packed.items():
        by_grid.setdefault(_grid(tensor), []).append(name)
    # A tied head is a linear layer too to a loader that goes by class.
    ignored = [*found.float_linears, *([] if HEAD in found.packed else [HEAD])]
    groups = {}
    for number, (spec, names) in enumerate(by_grid.items()):
        targets = ["Linear"] if len(by_grid) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weights(spec),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
    }


def _grid(tensor: QuantizedTensor) -> QuantSpec:
    """Its grid; a group longer than the column is the column, or loaders would divide one by the other."""
    spec = grid_of(tensor)
    return replace(spec, group_size=-1) if spec.group_size > tensor.d_in else spec


def _weights(spec: QuantSpec) -> dict[str, Any]:
    by_channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if by_channel else "group",
        "group_size": None if by_channel else spec.group_size,
        "dynamic": False,
    }
