"""Quantizes on several CPU devices, which a process must ask for before JAX starts: JSON on stdout."""

import json
import os
from typing import Any

DEVICES = 8

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import expert_models  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from tiny_quantization import float_model  # noqa: E402

from gptq_jax import QuantizedTensor, QuantSpec, gptq, learned_rounding, qep, quantize  # noqa: E402
from gptq_jax.calibration import Batch  # noqa: E402
from pallas_kernels.packing import unpack  # noqa: E402

GENERATOR = np.random.default_rng(0)
BATCHES = [
    Batch(GENERATOR.integers(0, 48, (3, 24), dtype=np.int32), np.arange(24) < GENERATOR.integers(10, 25, (3, 1)))
    for _ in range(10)  # as many as no number of devices divides but 2
]
SPEC = QuantSpec(bits=3, group_size=24, symmetric=False, scale_dtype="float16")
MODELS = {
    "gptq": (lambda: float_model(layers=2), gptq(grid="minmax"), (2, 4, 8)),
    "qep": (lambda: float_model(layers=2), qep(gptq(grid="minmax")), (4,)),
    "tuned": (
        lambda: float_model(layers=2),
        gptq(grid="minmax")._replace(tuning=learned_rounding(epochs=1)),
        (3,),
    ),
    "experts": (lambda: expert_models.float_model("mixtral"), gptq(grid="minmax"), (3,)),
}


def codes(model: Any) -> list[np.ndarray]:
    """Of every packed layer, all experts of one together."""
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    return [
        np.stack([unpack(one, 3, leaf.d_in) for one in leaf.codes.reshape(-1, *leaf.codes.shape[-2:])])
        for leaf in packed
    ]


def results() -> dict[str, Any]:
    """How the codes and the loss on many devices differ from those on one, by case."""
    found = {}
    for name, (make, method, counts) in MODELS.items():
        model = make()
        alone, report = quantize(model, BATCHES, SPEC, method)
        for count in counts:
            many, theirs = quantize(model, BATCHES, SPEC, method, devices=count)
            same = [np.mean(a == b) for a, b in zip(codes(alone), codes(many), strict=True)]
            tokens = [layer.tokens for layer in report.layers] == [layer.tokens for layer in theirs.layers]
            found[f"{name} on {count}"] = [float(np.min(same)), theirs.loss / report.loss, tokens]
    return found


if __name__ == "__main__":
    print(json.dumps(results()))
