"""The child of solver.py that runs this library's solver; not a command of its own."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from measuring import pin, serve, timed, versions


def handlers() -> Mapping[str, Callable[..., Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptq_jax.methods.gptq import GPTQOptions, solve_layer
    from gptq_jax.spec import QuantSpec

    arrays: dict[str, jax.Array] = {}
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))

    def hello() -> Any:
        jax.block_until_ready(product(jnp.ones((8, 8)), jnp.ones((8, 8))))
        return versions("gptq-jax", "jax", "jaxlib", "numpy")

    def take(path: str) -> None:
        with np.load(path) as layer:
            arrays.update(weight=jnp.asarray(layer["weight"].T), hessian=jnp.asarray(layer["hessian"]))

    def matmul() -> Any:
        square = arrays["hessian"]
        return timed(lambda: jax.block_until_ready(product(square, square)))[0]

    def solve(spec: dict[str, Any], options: dict[str, Any], save: str | None = None) -> Any:
        grid, how = QuantSpec(**spec), GPTQOptions(**options)
        timing, solution = timed(
            lambda: jax.block_until_ready(solve_layer(arrays["weight"], arrays["hessian"], grid, how))
        )
        if save:
            np.save(save, np.asarray(solution.tensor.dequantize()).T)
        return {
            **timing,
            "damping": float(solution.notes["damping"]),
            "fell_back": bool(solution.notes["fell_back"]),
        }

    return {"hello": hello, "take": take, "matmul": matmul, "solve": solve}


if __name__ == "__main__":
    pin(int(sys.argv[1]))
    serve(handlers)
