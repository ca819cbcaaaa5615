"""What run.py runs: each item yields rows of plain data, the most important first."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptq_jax.bench import decode, kernels
from gptq_jax.bench.shapes import SHAPES
from gptq_jax.bench.timing import Yardstick, measure_yardstick, seconds_each
from gptq_jax.block import BlockTask, quantize_block
from gptq_jax.generate import generate_tokens
from gptq_jax.methods.gptq import GPTQOptions, gptq, solve_layer
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.prepared import prepare
from gptq_jax.models.quantizable import Calibration
from gptq_jax.parallel import DataParallel
from gptq_jax.spec import QuantSpec
from gptq_jax.stream import KEPT_BYTES, open_stream
from pallas_kernels import api
from pallas_kernels.weight import concatenate

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: as the targets have it, or tiny, to see the command run anywhere."""

    square: int
    tokens: tuple[int, ...]
    small: DecoderConfig
    large: DecoderConfig
    batches: tuple[int, ...]
    steps: int
    solver: tuple[tuple[int, int], ...]
    block_samples: int
    block_length: int
    check_shapes: tuple[tuple[int, int], ...]
    checks: int
    yardstick: dict[str, int]


_TINY = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=512,
)
FULL = Scale(
    square=8192,
    tokens=(1, 16, 64, 256, 2048, 8),
    small=SHAPES["llama-7b"],
    large=SHAPES["llama-70b"],
    batches=(1, 8, 32),
    steps=32,
    solver=((4096, 4096), (4096, 11008)),
    block_samples=128,
    block_length=2048,
    check_shapes=((4096, 4096), (576, 1536), (1536, 200)),
    checks=33,
    yardstick={},
)
TINY = Scale(
    square=256,
    tokens=(1,),
    small=_TINY,
    large=_TINY,
    batches=(1,),
    steps=2,
    solver=((64, 48),),
    block_samples=4,
    block_length=16,
    check_shapes=((160, 72),),
    checks=3,
    yardstick={"copy_bytes": 1 << 22, "size": 128},
)


@dataclass(frozen=True)
class Context:
    """What items share."""

    scale: Scale
    yardstick: Yardstick


def correctness(context: Context) -> Rows:
    """Every kind of grid at several numbers of tokens: all values, and pairs of most, not all products of them."""
    grids = [
        {"bits": bits, "group_size": group, "symmetric": symmetric, "permuted": permuted}
        for bits, group, symmetric, permuted in (
            (4, 128, True, False),
            (4, 128, False, True),
            (8, 64, True, False),
            (4, 32, False, False),
            (3, 128, False, False),
            (2, 64, True, False),
            (4, -1, True, False),
            (8, -1, False, False),
            (8, 128, False, True),
            (3, 32, True, True),
            (2, -1, False, False),
        )
    ]
    tokens = itertools.cycle((1, 17, 3, 130, 8, 64, 2000))
    dtypes = itertools.cycle(("bfloat16", "bfloat16", "float16"))
    key = jax.random.key(time.time_ns() % 2**32)
    cases = itertools.islice(itertools.product(grids, context.scale.check_shapes), context.scale.checks)
    for number, (grid, shape) in enumerate(cases):
        count, dtype = next(tokens), next(dtypes)
        row = {"shape": "x".join(map(str, shape)), "tokens": count, "x_dtype": dtype, **grid}
        try:
            weight = kernels.random_weight(jax.random.fold_in(key, number), *shape, **grid)
            prepared = api.prepare(weight, x_dtype=dtype)
            x = jax.random.normal(jax.random.fold_in(key, 1000 + number), (count, shape[0]), jnp.dtype(dtype))
            error = kernels.check_product(x, weight, prepared)
        except Exception as error_found:
            yield {**row, "failed": told(error_found)}
            continue
        target = {"target": f"< {kernels.LARGEST_ERROR}", "met": error < kernels.LARGEST_ERROR}
        yield {**row, "implementation": prepared.implementation, "relative_error": error, **target}


def behaviour(context: Context) -> Rows:
    """Leading dimensions, bias, gradient and stacked experts, against the reference."""
    d_in, d_out = context.scale.check_shapes[0]
    weight = kernels.random_weight(jax.random.key(1), d_in, d_out)
    x = jax.random.normal(jax.random.key(2), (2, 5, d_in), jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(3), (d_out,), jnp.bfloat16)
    prepared, reference = (api.prepare(weight, name, "bfloat16") for name in (None, "reference"))

    def loss(x: jax.Array, weight: api.PreparedWeight) -> jax.Array:
        return jnp.sum(jnp.sin(api.quantized_matmul(x, weight).astype(jnp.float32)))

    checks: dict[str, Callable[[Any], jax.Array]] = {
        "leading dimensions": lambda weight: api.quantized_matmul(x, weight),
        "bias": lambda weight: api.quantized_matmul(x, weight, bias=bias),
        "gradient in x": lambda weight: jax.grad(loss)(x, weight),
        "vmap": lambda weight: jax.vmap(lambda x: api.quantized_matmul(x, weight))(x),
    }
    for name, check in checks.items():
        error = relative_error(check(prepared), check(reference))
        yield {"check": name, "relative_error": error, "implementation": prepared.implementation, "met": error < 2e-2}
    stack = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), weight, kernels.random_weight(jax.random.key(4), d_in, d_out)
    )
    sizes = jnp.array([3, 7])
    experts, exact = (api.prepare(stack, name, "bfloat16") for name in (None, "reference"))
    error = relative_error(*(api.grouped_matmul(x.reshape(10, d_in), each, sizes) for each in (experts, exact)))
    yield {
        "check": "stacked experts",
        "relative_error": error,
        "implementation": experts.implementation,
        "met": error < 2e-2,
    }


def product_targets(context: Context) -> Rows:
    """The square product that the targets are set for."""
    size = context.scale.square
    for tokens in context.scale.tokens:
        row = kernels.measure_product(size, size, tokens, context.yardstick, repeats=5)
        yield row | _target(tokens, row)


def _target(tokens: int, row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return {"met": False}
    if tokens <= 16:
        return {"target": "1.6x of the floor, then 1.25x", "met": row["of_roofline"] >= 1 / 1.6}
    least = {64: 2.0, 256: 1.0, 2048: 0.85}.get(tokens)
    return {} if least is None else {"target": f"{least}x float", "met": row["speedup"] >= least}


def products_of_models(context: Context, name: str) -> Rows:
    """Every product of a block."""
    yield from kernels.measure_shapes(
        getattr(context.scale, name), context.scale.tokens[:3], context.yardstick, repeats=3
    )


def fused_products(context: Context) -> Rows:
    """q/k/v in one product against three."""
    config = context.scale.small
    sizes = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    dtype = context.yardstick.dtype
    for tokens in (1, 16):
        packed = [
            [
                kernels.random_weight(jax.random.key(10 * copy + part), config.hidden_size, d_out)
                for part, d_out in enumerate(sizes)
            ]
            for copy in range(8)
        ]
        together = [api.prepare(concatenate(parts), x_dtype=dtype) for parts in packed]
        apart = [[api.prepare(part, x_dtype=dtype) for part in parts] for parts in packed]
        x = jax.random.normal(jax.random.key(0), (tokens, config.hidden_size), jnp.dtype(dtype))

        def separate(x: jax.Array, parts: list[api.PreparedWeight]) -> jax.Array:
            return jnp.concatenate([api.quantized_matmul(x, part) for part in parts], axis=-1)

        one = seconds_each(api.quantized_matmul, x, together, guess=1e-5, repeats=5)
        three = seconds_each(separate, x, apart, guess=3e-5, repeats=5)
        yield {"tokens": tokens, "together_us": 1e6 * one, "apart_us": 1e6 * three, "met": one < three}


def preparing(context: Context) -> Rows:
    """Seconds to repack the weights of a whole model, after one block has been compiled for."""
    config = context.scale.small
    model = decode.random_model(config, QuantSpec(), context.yardstick.dtype, 2)
    jax.block_until_ready(prepare(model).params)
    start = time.perf_counter()
    jax.block_until_ready(prepare(model).params)
    seconds = (time.perf_counter() - start) / 2 * config.num_layers
    yield {"layers": config.num_layers, "seconds": seconds, "reckoned_from": "2 blocks"}


def decoding(context: Context, name: str, batches: tuple[int, ...] | None = None) -> Rows:
    """Tokens per second, quantized and float, the batches in order of interest."""
    config: DecoderConfig = getattr(context.scale, name)
    floats: dict[int, float] = {}
    for batch in batches or context.scale.batches:
        for spec in (None, QuantSpec()):
            options = {"dtype": context.yardstick.dtype, "steps": context.scale.steps}
            for row in decode.measure_decode(config, [batch], spec, **options):
                if spec is None:
                    floats[batch] = row["step_ms"]
                elif batch in floats:
                    row["speedup"] = floats[batch] / row["step_ms"]
                    if batch == 1 and name == "small":
                        row |= {"target": "2.5x float, then 3.2x", "met": row["speedup"] >= 2.5}
                yield row


def model_outputs(context: Context) -> Rows:
    """Logits and greedy tokens of a quantized model, kernels against the reference."""
    config = replace(context.scale.small, num_layers=2)
    model = decode.random_model(config, QuantSpec(), "bfloat16", 2)
    tokens = np.arange(48, dtype=np.int32)[None] % config.vocab_size
    ready, reference = prepare(model), prepare(model, "reference", fuse=False)
    logits = [each(tokens) for each in (ready, reference)]
    agreement = float(jnp.mean(jnp.argmax(logits[0], -1) == jnp.argmax(logits[1], -1)))
    streams = [
        list(generate_tokens(each, tokens[0, :16], max_new_tokens=16, stop_tokens=())) for each in (ready, reference)
    ]
    yield {
        "implementations": decode.implementations(ready.params),
        "logits_relative_error": relative_error(*logits),
        "likeliest_token_agrees": agreement,
        "greedy_tokens_equal": streams[0] == streams[1],
    }


def solver(context: Context) -> Rows:
    """The solver by itself, and its loss against that of the processor."""
    spec, options = QuantSpec(), GPTQOptions()
    for d_in, d_out in context.scale.solver:
        weight, hessian = _layer(d_in, d_out)
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(solve_layer(weight, hessian, spec, options))
            samples.append(time.perf_counter() - start)
        yield {"shape": f"{d_in}x{d_out}", "seconds": statistics.median(samples[1:]), "first_call_seconds": samples[0]}
    d_in, d_out = min(context.scale.solver[0][0], 1024), min(context.scale.solver[0][1], 1024)
    losses = []
    for device in (jax.local_devices()[0], jax.local_devices(backend="cpu")[0]):
        with jax.default_device(device):
            weight, hessian = (jax.device_put(array, device) for array in _layer(d_in, d_out))
            error = weight - solve_layer(weight, hessian, spec, options).tensor.dequantize()
            losses.append(float(jnp.sum(error * jnp.matmul(hessian, error, precision="highest"))))
    difference = abs(losses[0] / losses[1] - 1)
    yield {"shape": f"{d_in}x{d_out}", "loss_against_cpu": difference, "target": "< 0.001", "met": difference < 1e-3}


def _layer(d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
    of_weight, of_inputs = jax.random.split(jax.random.key(0))
    x = jax.random.normal(of_inputs, (2 * d_in, d_in)) * jnp.linspace(0.2, 2.0, d_in)
    return jax.random.normal(of_weight, (d_in, d_out)), jnp.matmul(x.T, x, precision="highest") / d_in


def block(context: Context) -> Rows:
    """One block with random weights and inputs: capture, Hessians, solve and replay."""
    scale, config = context.scale, replace(context.scale.small, num_layers=1)
    dtype = context.yardstick.dtype
    (one,) = decode.random_model(config, None, dtype, 1).blocks()
    size = min(8, scale.block_samples)
    shape = (size, scale.block_length, config.hidden_size)
    make = partial(jax.random.normal, shape=shape, dtype=jnp.dtype(dtype))
    for samples in (size, scale.block_samples):  # the first compiles
        states = [make(jax.random.key(batch)) for batch in range(samples // size)]
        calibration = Calibration(
            blocks=[one], start=lambda states=states: states, masks=[None] * len(states), kept_float={}, assemble=print
        )
        stream = open_stream(calibration, [shape] * len(states), DataParallel(None), budget=KEPT_BYTES)
        task = BlockTask(
            block=one,
            specs={path: QuantSpec(scale_dtype="float16") for group in one.groups for path in group},
            method=gptq(),
            streams=[stream],
        )
        losses: list[float] = []
        start = time.perf_counter()
        packed = quantize_block(task, lambda report, losses=losses: losses.append(report.loss))
        jax.block_until_ready(packed)
        seconds = time.perf_counter() - start
        row = {"samples": samples, "tokens_each": scale.block_length, "seconds": seconds, **task.clock.seconds}
        row["layers_solved"] = len(losses)
        if samples == scale.block_samples:
            yield row | {"target": "2 s on an H100", "met": seconds <= 2}
        else:
            yield {"note": "compiles", **row}


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """|out - expected| / |expected|."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((out - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def yardstick(scale: Scale) -> Yardstick:
    """Of this device."""
    return measure_yardstick(**scale.yardstick)


# Name, what runs, and the share of the time left that it may take, checked between its rows.
ITEMS: tuple[tuple[str, Callable[[Context], Rows], float], ...] = (
    ("correctness", correctness, 0.25),
    ("behaviour", behaviour, 0.3),
    ("product", product_targets, 0.3),
    ("decode_7b", partial(decoding, name="small"), 0.45),
    ("block", block, 0.5),
    ("solver", solver, 0.5),
    ("fused", fused_products, 0.5),
    ("products_7b", partial(products_of_models, name="small"), 0.5),
    ("model_outputs", model_outputs, 0.5),
    ("preparing", preparing, 0.5),
    ("products_70b", partial(products_of_models, name="large"), 0.6),
    ("decode_70b", partial(decoding, name="large", batches=(1,)), 1.0),
)
