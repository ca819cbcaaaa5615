"""The children of decode.py: one holds the float model, one the quantized; not a command of its own."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from measuring import peak_bytes, resident_bytes, serve


def handlers() -> Mapping[str, Callable[..., Any]]:
    import jax
    from models import calibration, float_model

    from gptq_jax.generate import generate_tokens
    from gptq_jax.methods import rtn
    from gptq_jax.models.base import Model
    from gptq_jax.models.prepared import prepare
    from gptq_jax.pipeline import quantize
    from gptq_jax.spec import QuantSpec
    from gptq_jax.storage.load import load
    from gptq_jax.storage.store import save, tree_bytes

    held: list[Model] = []
    jax.block_until_ready(jax.numpy.ones(8) + 1)  # the runtime's own memory, before the model's
    start = resident_bytes()

    def make_store(path: str, spec: dict[str, Any]) -> None:
        model = float_model()
        packed, _ = quantize(model, calibration(None, model.tokenizer, 1, 64, 0), QuantSpec(**spec), rtn())
        save(packed, path)

    def take(path: str | None) -> Any:
        began = time.perf_counter()
        held.append(prepare(load(path)) if path else float_model())
        jax.block_until_ready(held[0].params)
        return {
            "load_seconds": time.perf_counter() - began,
            "parameter_bytes": tree_bytes(held[0].params),
            "resident_growth_load": resident_bytes() - start,
        }

    def decode(prompt: str, new_tokens: int) -> Any:
        (model,) = held
        tokens = model.tokenizer(prompt)["input_ids"]
        began, cpu = time.perf_counter(), time.process_time()
        stream = generate_tokens(model, tokens, max_new_tokens=new_tokens, stop_tokens=())
        found = [next(stream)]
        first, first_cpu = time.perf_counter(), time.process_time()
        found += stream
        wall, cpu_decode = time.perf_counter() - first, time.process_time() - first_cpu
        return {
            "prompt_tokens": len(tokens),
            "first_token_seconds": first - began,
            "first_token_cpu": first_cpu - cpu,
            "wall": wall,
            "cpu": cpu_decode,
            "tokens_per_second": (len(found) - 1) / wall,
            "tokens": found,
            "resident_growth": resident_bytes() - start,
            "peak_bytes": peak_bytes(),
        }

    return {"make_store": make_store, "take": take, "decode": decode}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("decode_child.py is started by decode.py and takes no arguments.")
    serve(handlers)
