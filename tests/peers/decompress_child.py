"""Decompress every module of a compressed-tensors directory with the compressed-tensors package.

    python decompress_child.py DIR OUT

OUT gets one .npy for each module. Scales are widened to float32 first, so that the products are not rounded.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file


def main(path, out):
    config = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    modules = {}
    for name, values in load_file(Path(path) / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = values
    for module, tensors in modules.items():
        if "weight_packed" in tensors:
            tensors["weight_scale"] = tensors["weight_scale"].to(torch.float32)
            weight = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
            np.save(Path(out) / f"{module}.npy", weight.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
