"""Products with packed weights against float ones, for the shapes of real models."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gptq_jax.bench.shapes import products
from gptq_jax.bench.timing import Yardstick, copies_for, device_kind, seconds_each
from gptq_jax.models.decoder import DecoderConfig
from pallas_kernels import api
from pallas_kernels.mosaic_gpu import tuning
from pallas_kernels.mosaic_gpu.rules import RULES
from pallas_kernels.packing import packed_words
from pallas_kernels.reference import dequantize_weight
from pallas_kernels.weight import PackedWeight, describe

LARGEST_ERROR = 5e-3  # |out - reference| / |reference| in bfloat16


def random_weight(
    key: PRNGKeyArray,
    d_in: int,
    d_out: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    permuted: bool = False,
) -> PackedWeight:
    """A packed weight of random codes, made where JAX computes; its products are about as large as the inputs.

    Args:
        key: of the random numbers.
        d_in: inputs.
        d_out: outputs.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 for all.
        symmetric: no zero points.
        permuted: groups of inputs that do not lie side by side.
    """
    group_rows = d_in if group_size == -1 else min(group_size, d_in)
    return _random_weight(key, d_in, d_out, bits, group_rows, symmetric, permuted)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _random_weight(
    key: PRNGKeyArray, d_in: int, d_out: int, bits: int, group_rows: int, symmetric: bool, permuted: bool
) -> PackedWeight:
    of_codes, of_scales, of_zeros, of_order = jax.random.split(key, 4)
    groups = -(-d_in // group_rows)
    scales = jax.random.uniform(of_scales, (groups, d_out), jnp.float32, 2.0, 4.0) / (2**bits * d_in**0.5)
    zeros = None if symmetric else jax.random.randint(of_zeros, (groups, d_out), 0, 2**bits).astype(jnp.uint8)
    rows = jnp.arange(d_in, dtype=jnp.int32) // group_rows
    return PackedWeight(
        codes=jax.random.bits(of_codes, (packed_words(d_in, bits), d_out), jnp.uint32),
        scales=scales.astype(jnp.float16),
        zeros=zeros,
        group_of_row=jax.random.permutation(of_order, rows) if permuted else None,
        bits=bits,
        group_rows=group_rows,
        d_in=d_in,
    )


def check_product(x: Float[Array, "tokens d_in"], weight: PackedWeight, prepared: api.PreparedWeight) -> float:
    """|out - reference| / |reference|, where the memory of the result held NaN before.

    Args:
        x: fresh activations.
        weight: what `prepared` was made of.
        prepared: for the implementation that is checked.
    """
    expected = _reference(x, weight)
    poison = jax.block_until_ready(jnp.full((x.shape[0], weight.d_out), jnp.nan, x.dtype))
    poison.delete()
    out = api.quantized_matmul(x, prepared).astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


@jax.jit
def _reference(x: Float[Array, "tokens d_in"], weight: PackedWeight) -> Float[Array, "tokens d_out"]:
    return jnp.matmul(x.astype(jnp.float32), dequantize_weight(weight), precision="highest")


def measure_product(
    d_in: int,
    d_out: int,
    tokens: int,
    yardstick: Yardstick,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    implementation: str | None = None,
    baselines: bool = True,
    repeats: int = 7,
    seed: int | None = None,
) -> dict[str, Any]:
    """One product, checked, then timed against a float product and against XLA's dequantize-then-multiply.

    Args:
        d_in: inputs.
        d_out: outputs.
        tokens: rows of x.
        yardstick: of this device; its dtype is that of x and of the float weights.
        bits, group_size, symmetric: the grid.
        implementation: a name in `api.IMPLEMENTATIONS`; None for the one that runs here.
        baselines: whether to time what it is compared with.
        repeats: of each timing; the median counts.
        seed: of the random numbers; None for others every time.

    Returns:
        Plain data: microseconds, the ratio to the float product, the share of the roofline that is reached.
    """
    dtype = jnp.dtype(yardstick.dtype)
    key = jax.random.key(time.time_ns() % 2**32 if seed is None else seed)
    make = partial(random_weight, d_in=d_in, d_out=d_out, bits=bits, group_size=group_size, symmetric=symmetric)
    first = make(key)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    traffic = tokens * (d_in + d_out) * dtype.itemsize
    floor = yardstick.floor(nbytes + traffic, 2 * tokens * d_in * d_out)
    packed = [first] + [make(jax.random.fold_in(key, copy)) for copy in range(1, copies_for(nbytes))]
    x = jax.random.normal(jax.random.fold_in(key, 1000), (tokens, d_in), dtype)
    prepared = [api.prepare(weight, implementation, dtype) for weight in packed]
    error = check_product(x, first, prepared[0])
    row: dict[str, Any] = {
        "d_in": d_in,
        "d_out": d_out,
        "tokens": tokens,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "x_dtype": dtype.name,
        "implementation": prepared[0].implementation,
        "relative_error": error,
        "floor_us": 1e6 * floor,
        "weights_in_turn": len(packed),
    }
    if not error < LARGEST_ERROR:
        return {**row, "failed": f"relative error {error:.3g} is not below {LARGEST_ERROR}: not timed"}
    ours = seconds_each(api.quantized_matmul, x, prepared, guess=2 * floor, repeats=repeats)
    row |= {"us": 1e6 * ours, "of_roofline": floor / ours}
    del prepared
    if baselines:
        row["dequantize_us"] = 1e6 * seconds_each(_dequantize_then_multiply, x, packed, guess=20 * floor, repeats=3)
        floats = copies_for(d_in * d_out * dtype.itemsize)
        dense = [jax.jit(dequantize_weight)(weight).astype(dtype) for weight in packed[:floats]]
        del packed
        row["float_us"] = 1e6 * seconds_each(_multiply, x, dense, guess=4 * floor, repeats=repeats)
        row["speedup"] = row["float_us"] / row["us"]
    return row


def measure_shapes(
    config: DecoderConfig, tokens: Sequence[int], yardstick: Yardstick, **options: Any
) -> Iterator[dict[str, Any]]:
    """`measure_product` for every product of a block and every number of tokens.

    A failure is a row too, with its error, so that the others are still measured.
    """
    for name, (d_in, d_out) in products(config).items():
        for count in tokens:
            about = {"product": name, "d_in": d_in, "d_out": d_out, "tokens": count}
            try:
                yield about | measure_product(d_in, d_out, count, yardstick, **options)
            except (RuntimeError, NotImplementedError, MemoryError) as error:  # XLA's errors are RuntimeErrors
                yield about | {"failed": " ".join(str(error).split())[:500]}


def tune(
    d_in: int,
    d_out: int,
    tokens: int,
    yardstick: Yardstick,
    *,
    bits: int = 4,
    group_size: int = 128,
    on_candidate: Callable[[int, int], None] = lambda done, total: None,
    **about: Any,
) -> dict[str, Any]:
    """Time every tiling that fits, write the fastest that is right into the device's table, and return its row.

    Args:
        d_in, d_out, tokens, yardstick, bits, group_size: as for `measure_product`.
        on_candidate: called with how many are done, and of how many.
        about: what else the entry of the table should say.

    Raises:
        NotImplementedError: the implementation that runs here takes no tiling, or none of them works.
    """
    weight = jax.eval_shape(
        partial(random_weight, d_in=d_in, d_out=d_out, bits=bits, group_size=group_size), jax.random.key(0)
    )
    problem = describe(weight, tokens, yardstick.dtype)
    chosen = next(name for name, answer in api.explain(problem).items() if answer == "runs")
    if chosen not in RULES:
        raise NotImplementedError(f"{chosen} runs here and takes no tiling: only {' and '.join(RULES)} can be tuned.")
    tilings = RULES[chosen].candidates(problem)
    found: list[tuple[float, tuning.Tiling]] = []
    failures: list[str] = []
    for done, tiling in enumerate(tilings):
        on_candidate(done, len(tilings))
        jax.clear_caches()  # what was traced with another tiling
        try:
            with tuning.forced(tiling):
                row = measure_product(
                    d_in, d_out, tokens, yardstick, bits=bits, group_size=group_size, baselines=False, repeats=5
                )
        except (RuntimeError, NotImplementedError, ValueError) as error:  # too much shared memory, say
            row = {"failed": " ".join(str(error).split())[:200]}
        if "failed" in row:
            failures.append(f"{tiling}: {row['failed']}")
        else:
            found.append((row["us"], tiling))
    jax.clear_caches()
    if not found:
        raise NotImplementedError(f"no tiling works for {problem}: {'; '.join(failures)}")
    best_us, best = min(found, key=lambda pair: pair[0])
    path = tuning.record(device_kind(), problem, best, best_us, jax=jax.__version__, **about)
    return {
        "d_in": d_in,
        "d_out": d_out,
        "tokens": tokens,
        "us": best_us,
        "rule_us": next((us for us, tiling in found if tiling == tilings[0]), None),
        "tiling": str(best),
        "failures": failures,
        "table": path.name,
    }


def _multiply(x: Float[Array, "tokens d_in"], weight: Float[Array, "d_in d_out"]) -> Float[Array, "tokens d_out"]:
    return jnp.matmul(x, weight)


def _dequantize_then_multiply(x: Float[Array, "tokens d_in"], weight: PackedWeight) -> Float[Array, "tokens d_out"]:
    return jnp.matmul(x, dequantize_weight(weight).astype(x.dtype))
