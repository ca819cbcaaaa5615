"""The child of solver.py that runs GPTQModel's solver in its own environment; not a command of its own.

Its GPTQ class is given a linear layer and the Hessian that calibration would have left in it; what is timed is
`quantize()`, which permutes, damps, factorizes and rounds, as ours does.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from measuring import pin, serve, timed, versions


def handlers() -> Mapping[str, Callable[..., Any]]:
    import numpy as np
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.set_num_threads(int(sys.argv[1]))
    arrays: dict[str, torch.Tensor] = {}

    def hello() -> Any:
        return {**versions("gptqmodel", "torch", "numpy"), "threads": torch.get_num_threads()}

    def take(path: str) -> None:
        with np.load(path) as layer:
            arrays.update({name: torch.from_numpy(layer[name].copy()) for name in ("weight", "hessian")})

    def matmul() -> Any:
        square = arrays["hessian"]
        return timed(lambda: square @ square)[0]

    def solve(config: dict[str, Any], tokens: int, save: str | None = None) -> Any:
        rows, columns = arrays["weight"].shape
        linear = torch.nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu")
        linear.weight.data.copy_(arrays["weight"])
        solver = GPTQ(linear, QuantizeConfig(**config, act_group_aware=False, fallback=None, offload_to_disk=False))
        solver.quantizer.configure(perchannel=True)
        solver.H = arrays["hessian"].clone()
        solver.nsamples = tokens
        with torch.inference_mode():
            timing, (quantized, _, _, _, _, _, damping, _) = timed(solver.quantize)
        if save:
            np.save(save, quantized.numpy())
        return {**timing, "damping": float(damping), "fell_back": bool(solver.qcfg.mock_quantization)}

    return {"hello": hello, "take": take, "matmul": matmul, "solve": solve}


if __name__ == "__main__":
    pin(int(sys.argv[1]))
    serve(handlers)
