"""Seconds of a product as it runs inside a model: in one compiled loop, its weights coming from memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

COLD_BYTES = 256 << 20  # of weights in turn: several times what the last cache of a processor or card holds
MOST_COPIES = 16
_LEAST_SECONDS = 0.02  # of a run of the loop

Product = Callable[[Array, Any], Array]


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What the device can do at most, measured.

    Attributes:
        device: its name.
        dtype: of the matrix product.
        bytes_per_second: read and written by a copy.
        flops_per_second: of a large square matrix product.
    """

    device: str
    dtype: str
    bytes_per_second: float
    flops_per_second: float

    def floor(self, nbytes: int | float, flops: int | float) -> float:
        """Seconds that moving the bytes and doing the sums takes at least."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second)


def device_kind() -> str:
    """The name of the device JAX computes on; a CPU's is only "cpu"."""
    return jax.local_devices()[0].device_kind


def default_dtype() -> str:
    """bfloat16 on an accelerator; float32 on a CPU, which has no faster product."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def copies_for(nbytes: int) -> int:
    """Weights that must take turns so that none is still in a cache when its turn comes."""
    return max(2, min(MOST_COPIES, -(-COLD_BYTES // nbytes)))


def seconds_each(
    product: Product, x: Float[Array, "tokens d_in"], weights: Sequence[Any], *, guess: float, repeats: int = 7
) -> float:
    """The median time of one product, over `repeats` runs of a compiled loop through all of `weights`.

    Args:
        product: (x, weight) -> [tokens, d_out].
        x: activations; finite, as must be what comes out.
        weights: pytrees of the same shapes, different in content.
        guess: of the seconds, by which the loop's length is chosen.
        repeats: runs after one to warm up.
    """
    rounds = max(1, min(1000, round(_LEAST_SECONDS / (guess * len(weights)))))
    run = jax.jit(partial(_chain, product, rounds)).lower(x, list(weights)).compile()
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(x, list(weights)))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:]) / (rounds * len(weights))


def _chain(product: Product, rounds: int, x: Array, weights: list[Any]) -> Array:
    """Every product, none of which can begin before, be merged with, or be left out for another."""

    def turn(_: Any, x: Array) -> Array:
        for weight in weights:
            x, weight = jax.lax.optimization_barrier((x, weight))  # else XLA could unpack it once, before the loop
            y = jax.lax.optimization_barrier(product(x, weight))  # else XLA could take just the element below
            x = x.at[0, 0].add((y[0, 0] * 0).astype(x.dtype))  # + 0, which XLA cannot know
        return x

    return jax.lax.fori_loop(0, rounds, turn, x)


def measure_yardstick(dtype: str | None = None, *, copy_bytes: int | None = None, size: int | None = None) -> Yardstick:
    """The copy bandwidth and the matmul rate of this device.

    Args:
        dtype: of the matrix product; None for `default_dtype()`.
        copy_bytes: of the array that is copied; None for 1 GiB, 256 MiB on a CPU.
        size: of the matrices; None for 8192, 2048 on a CPU.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or default_dtype()
    copy_bytes = copy_bytes or (256 << 20 if on_cpu else 1 << 30)
    size = size or (2048 if on_cpu else 8192)
    array = jnp.zeros((copy_bytes // 4,), jnp.float32)
    rounds = 4 if on_cpu else 20
    copying = jax.jit(lambda array: jax.lax.fori_loop(0, rounds, lambda _, array: array + 1, array), donate_argnums=0)
    copy_seconds = []
    for _ in range(5):
        start = time.perf_counter()
        array = jax.block_until_ready(copying(array))
        copy_seconds.append(time.perf_counter() - start)
    del array
    keys = jax.random.split(jax.random.key(0), 3)
    x, *weights = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) * size**-0.5 for key in keys)
    seconds = seconds_each(_dot, x, weights, guess=1e-3 if not on_cpu else 0.2, repeats=3)
    return Yardstick(
        device=device_kind(),
        dtype=dtype,
        bytes_per_second=2 * copy_bytes * rounds / statistics.median(copy_seconds[1:]),
        flops_per_second=2 * size**3 / seconds,
    )


def _dot(x: Float[Array, "tokens d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "tokens d_out"]:
    return jnp.matmul(x, weight)
