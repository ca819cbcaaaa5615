"""From how many tokens on an expert's own Hessian is better than that of all tokens.

    python benchmarks/experts.py
    python benchmarks/experts.py --text some.txt --block 20 --experts 16

There is no model with experts small enough to come in a package, so a random linear router deals the tokens that
reach one layer of SmolLM2-135M to experts, who all have its weight. An expert is solved for so many of its tokens, or
for all tokens of the layer, and its output error is measured on other tokens of its own.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import RESULTS, setting, table, write
from models import NAME, float_model, read_text, source_name, windows

from gptq_jax.methods.gptq import gptq_solve
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.base import Model, capture_block, embed, run_block
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor

LAYER = "mlp.gate_proj"
SHARES = (0.25, 0.5, 1, 2, 4)  # rows of an expert over inputs of the layer
HELD_OUT = 600  # tokens of an expert that it is measured on


def inputs(model: Model, tokens: np.ndarray, block: int) -> np.ndarray:
    """What LAYER of a block is fed for windows of tokens, a row each."""
    found = []
    for batch in np.split(tokens, range(8, len(tokens), 8)):
        x = embed(model.config, model.params, jnp.asarray(batch))
        for index in range(block):
            x, _ = run_block(model.config, model.config.layer_kind(index), model.params["layers"][index], x)
        captured = capture_block(
            model.config, model.config.layer_kind(block), model.params["layers"][block], x, (LAYER,)
        )
        found.append(np.asarray(captured[LAYER]).reshape(-1, x.shape[-1]))
    return np.concatenate(found)


def measure(weight: jax.Array, rows: np.ndarray, experts: int, spec: QuantSpec) -> list[dict[str, Any]]:
    """A row for each expert that has enough tokens."""
    rng = np.random.default_rng(0)
    rows = rows[rng.permutation(len(rows))]
    router = rng.normal(size=(rows.shape[1], experts)) / (rows.std(axis=0)[:, None] + 1e-6)
    expert_of_row = np.argmax((rows - rows.mean(axis=0)) @ router, axis=1)

    def solved(calibration: np.ndarray) -> QuantizedTensor:
        return gptq_solve(weight, calibration.T @ calibration, spec)

    results = []
    for expert in range(experts):
        own = rows[expert_of_row == expert]
        if len(own) < HELD_OUT + SHARES[1] * rows.shape[1]:
            continue
        fit, test = own[:-HELD_OUT], own[-HELD_OUT:]

        def error(tensor: QuantizedTensor, test: np.ndarray = test) -> float:
            lost = test @ np.asarray(weight - tensor.dequantize())
            return float(np.linalg.norm(lost) / np.linalg.norm(test @ np.asarray(weight)))

        result: dict[str, Any] = {"expert": expert, "tokens": len(fit)}
        result["rtn"] = error(round_to_nearest(weight, spec))
        result["all"] = error(solved(np.concatenate([rows[expert_of_row != expert], fit])))
        for share in SHARES:
            count = int(share * rows.shape[1])
            result[f"own {share}"] = error(solved(fit[:count])) if count <= len(fit) else None
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text file; Python's documentation if left out")
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts", help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    model, spec = float_model(), QuantSpec(bits=4, group_size=64)
    about = setting(
        model=NAME,
        layer=f"layers.{options.block}.{LAYER}",
        grid=str(spec),
        tokens=f"{options.windows} x 512 of {source_name(options.text)}",
        experts=options.experts,
    )
    tokens = np.asarray(windows(read_text(options.text), model.tokenizer, options.windows, 512, 0), np.int32)
    weight = model.params["layers"][options.block]["mlp"]["gate_proj"]["kernel"]
    rows = measure(weight, inputs(model, tokens, options.block), options.experts, spec)
    headings = ["expert", "its tokens", "rounding", "all tokens", *(f"own, {share} x inputs" for share in SHARES)]
    text = "Output error |X(W-Q)| / |XW| on other tokens of the expert.\n\n"
    text += table(headings, [list(row.values()) for row in rows])
    write(options.out, "An expert's own tokens or all", about, rows, text)
    print(f"{text}\n\nwrote {options.out}.json and .md")


if __name__ == "__main__":
    main()
