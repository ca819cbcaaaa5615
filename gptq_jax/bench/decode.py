"""Tokens per second of a whole decoder with random weights, quantized against float."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PRNGKeyArray

from gptq_jax.bench.kernels import random_weight
from gptq_jax.bench.timing import default_dtype, device_kind
from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Model, apply_head, embed, head_params, linear_paths, run_block
from gptq_jax.models.decoder import DecoderConfig
from gptq_jax.models.prepared import prepare
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.api import PreparedWeight

CONTEXT = 128  # tokens that are in the cache before the first that is timed
_SHARE = 0.85  # of the memory that is free: the rest is for temporaries


def random_model(config: DecoderConfig, spec: QuantSpec | None, dtype: str, layers: int, *, seed: int = 0) -> Model:
    """A decoder of `layers` blocks, packed on random codes, or float where `spec` is None.

    Args:
        config: of the whole model.
        spec: the grid of every linear layer.
        dtype: of what is float.
        layers: blocks, no more than the model has.
        seed: of the random numbers.
    """
    config = replace(config, num_layers=layers)
    shapes = config.abstract_params()
    paths = linear_paths(config, "decoder")
    keys = iter(jax.random.split(jax.random.key(seed), layers + 2))
    outer = {name: _random_floats(shapes[name], next(keys), dtype) for name in ("embed", "head")}
    blocks = []
    for block in shapes["layers"]:
        block_key = next(keys)
        params = _random_floats(block, block_key, dtype, skip=() if spec is None else paths)
        if spec is not None:
            for index, path in enumerate(paths):
                parent, name = path.split(".")
                of_layer = jax.random.fold_in(block_key, index)
                kernel = _random_tensor(of_layer, block[parent][name]["kernel"].shape, spec)
                params = {**params, parent: {**params[parent], name: {**params[parent][name], "kernel": kernel}}}
        blocks.append(params)
    return Model(config, {**outer, "layers": blocks})


def measure_decode(
    config: DecoderConfig,
    batches: Sequence[int],
    spec: QuantSpec | None,
    *,
    dtype: str | None = None,
    steps: int = 32,
    repeats: int = 3,
    layers: int | None = None,
    implementation: str | None = None,
    fuse: bool = True,
    on_row: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Greedy decoding in one compiled loop, for each number of sequences, from a context of `CONTEXT` tokens.

    Where memory does not hold all blocks, those that fit are timed and the others reckoned: the row says so.

    Args:
        config: the model's shape.
        batches: numbers of sequences.
        spec: the grid; None for a float model.
        dtype: of what is float; None for `default_dtype()`.
        steps: tokens of a run.
        repeats: runs, of which the median counts.
        layers: blocks to time; None for as many as fit.
        implementation: as for `gptq_jax.prepare`.
        fuse: as for `gptq_jax.prepare`.
        on_row: called with what comes next.

    Returns:
        Plain data for each batch: seconds a step, tokens a second, bytes, the implementations in use.
    """
    dtype = dtype or default_dtype()
    fitting = layers_that_fit(config, spec, dtype, max(batches))
    timed = min(config.num_layers, layers or config.num_layers, fitting)
    label = dtype if spec is None else f"{spec.bits}-bit g{spec.group_size}"
    if timed < 1:
        raise ValueError(f"not one block of this shape fits the memory of {device_kind()}: choose a smaller shape.")
    on_row(f"making {timed} {label} blocks")
    model = random_model(config, spec, dtype, timed)
    if spec is not None:
        model = prepare(model, implementation, fuse=fuse)
    jax.block_until_ready(model.params)
    for batch in batches:
        on_row(f"{label}, batch {batch}")
        seconds = _seconds_a_step(model, batch, steps, repeats)
        row: dict[str, Any] = {
            "weights": label,
            "batch": batch,
            "layers": config.num_layers,
            "layers_timed": timed,
            "extrapolated": timed < config.num_layers,
            "implementations": implementations(model.params),
            "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            "timed_step_ms": 1e3 * seconds,
        }
        if row["extrapolated"]:
            outer = _seconds_a_step(_without_blocks(model), batch, steps, repeats)
            seconds = outer + (seconds - outer) * config.num_layers / timed
        yield row | {"step_ms": 1e3 * seconds, "tokens_per_second": batch / seconds}


def implementations(params: Params) -> list[str]:
    """Those that the prepared weights are for; "xla" where there are none."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PreparedWeight))
    return sorted({leaf.implementation for leaf in leaves if isinstance(leaf, PreparedWeight)}) or ["xla"]


def layers_that_fit(config: DecoderConfig, spec: QuantSpec | None, dtype: str, batch: int) -> int:
    """Blocks with their caches that the free memory of this device holds beside embedding and head."""
    shapes = config.abstract_params()
    itemsize = jnp.dtype(dtype).itemsize
    outer = itemsize * sum(leaf.size for leaf in jax.tree.leaves((shapes["embed"], shapes["head"])))
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"][0]))
    # Prepared beside what it is made from, before that is dropped.
    block = weights * (itemsize if spec is None else 2 * (spec.bits + 16 / 32) / 8)
    cache = 2 * batch * 2 * CONTEXT * config.num_kv_heads * config.head_dim * itemsize
    return int((_SHARE * free_bytes() - outer) / (block + cache))


def free_bytes() -> int:
    """Memory of this device, or of this machine for a CPU, that nothing uses."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _without_blocks(model: Model) -> Model:
    return replace(model, params={**model.params, "layers": []})


def _seconds_a_step(model: Model, batch: int, steps: int, repeats: int) -> float:
    config, params = model.config, model.params
    x_dtype = params["embed"]["embedding"].dtype
    caches = [config.init_cache(batch, 2 * CONTEXT, x_dtype) for _ in params["layers"]]
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None] % config.vocab_size
    run = jax.jit(partial(_decode, config, steps)).lower(params, tokens, caches).compile()
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(params, tokens, caches))
        samples.append(time.perf_counter() - start)
    return sorted(samples[1:])[repeats // 2] / steps


def _decode(
    config: DecoderConfig, steps: int, params: Params, tokens: Int32[Array, "batch 1"], caches: list[Any]
) -> tuple[Int32[Array, "batch 1"], list[Any]]:
    def step(index: Int32[Array, ""], state: tuple[Array, list[Any]]) -> tuple[Array, list[Any]]:
        # Else XLA could unpack the weights once, before the loop.
        (tokens, caches), own = jax.lax.optimization_barrier((state, params))
        positions = (CONTEXT + index).astype(jnp.int32)[None, None]
        x, after = embed(config, own, tokens), []
        for block, cache in zip(own["layers"], caches, strict=True):
            x, cache = run_block(config, "decoder", block, x, positions, cache)
            after.append(cache)
        logits = apply_head(config, head_params(config, own), x)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), after

    return jax.lax.fori_loop(0, steps, step, (tokens, caches))


def _random_floats(shapes: Params, key: PRNGKeyArray, dtype: str, skip: Sequence[str] = ()) -> Params:
    """Arrays in place of shapes: normalizations are ones; without the kernels of the layers `skip`."""

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Array:
        if len(shape.shape) == 1:
            return jnp.ones(shape.shape, dtype)
        of_leaf = jax.random.fold_in(key, sum(map(ord, jax.tree_util.keystr(path))))
        return _normal(of_leaf, shape.shape, dtype)

    kept: Params = {}
    for parent, child in shapes.items():
        kept[parent] = child
        if isinstance(child, dict):
            kept[parent] = {
                name: {k: v for k, v in value.items() if k != "kernel"} if f"{parent}.{name}" in skip else value
                for name, value in child.items()
            }
    return jax.tree_util.tree_map_with_path(leaf, kept)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(shape[0] ** -0.5, dtype)


def _random_tensor(key: PRNGKeyArray, shape: tuple[int, int], spec: QuantSpec) -> QuantizedTensor:
    weight = random_weight(key, *shape, bits=spec.bits, group_size=spec.group_size, symmetric=spec.symmetric)
    return QuantizedTensor(
        codes=weight.codes,
        scales=weight.scales,
        zeros=weight.zeros,
        group_of_row=None,
        spec=spec,
        d_in=weight.d_in,
    )
