"""The child of quantize.py, a process that does nothing but quantize; not a command of its own."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measuring import peak_bytes, resident_bytes, serve


def handlers() -> Mapping[str, Callable[..., Any]]:
    from models import calibration, float_model

    from gptq_jax.methods import gptq
    from gptq_jax.pipeline import quantize
    from gptq_jax.spec import QuantSpec

    def run(spec: dict[str, Any], text: str | None, samples: int, length: int, seed: int) -> Any:
        started = time.perf_counter()
        model = float_model()
        fit = calibration(Path(text) if text else None, model.tokenizer, samples, length, seed)
        loaded, resident = time.perf_counter(), resident_bytes()
        cpu = os.times()
        _, report = quantize(model, fit, QuantSpec(**spec), gptq())
        after = os.times()
        return {
            "load_seconds": loaded - started,
            "wall": time.perf_counter() - loaded,
            "cpu": after.user + after.system - cpu.user - cpu.system,
            "stages": report.seconds,
            "resident_after_load": resident,
            "peak_bytes": max(report.peak_bytes, peak_bytes()),
            "layers": len(report.layers),
            "bits_per_weight": report.bits_per_weight,
            "layer_loss": report.loss,
            "rounding_loss": sum(layer.rtn_loss for layer in report.layers),
            "fallbacks": list(report.fallbacks),
        }

    return {"run": run}


if __name__ == "__main__":
    serve(handlers)
