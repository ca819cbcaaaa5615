"""What one block needs beside its parameters, as XLA compiles it for this platform; nothing is computed.

In float32, whatever the parameters' dtype: a processor turns all of a block's bfloat16 kernels into float32 ones,
which the device that is planned for need not do.
"""

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from gptq_jax.models.base import Architecture, capture_block, embed, linear_paths, run_block
from gptq_jax.planning.sizes import float_shapes


@lru_cache(maxsize=64)
def forward_bytes(architecture: Architecture, kind: Hashable, batch: int, length: int) -> int:
    """Temporaries of a float block on [batch, length] tokens."""
    block = _block_shapes(architecture, kind)
    x = stream_shape(architecture, batch, length)
    run = jax.jit(lambda params, x: run_block(architecture, kind, params, x)[0])
    return _temporaries(run.lower(block, x).compile())


@lru_cache(maxsize=64)
def cached_bytes(architecture: Architecture, kind: Hashable, batch: int, tokens: int, cache: int) -> int:
    """Temporaries of a float block on [batch, tokens] more tokens against a cache of `cache`."""
    block = _block_shapes(architecture, kind)
    x = stream_shape(architecture, batch, tokens)
    positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    run = jax.jit(partial(run_block, architecture, kind), donate_argnums=3)
    return _temporaries(run.lower(block, x, positions, cache_shapes(architecture, batch, cache)).compile())


@lru_cache(maxsize=64)
def stream_shape(architecture: Architecture, batch: int, length: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """The residual stream of [batch, length] tokens."""
    params = float_shapes(architecture, dtype)["embed"]
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return jax.eval_shape(partial(embed, architecture), {"embed": params}, tokens)


@lru_cache(maxsize=64)
def input_shapes(architecture: Architecture, kind: Hashable, batch: int, length: int, dtype: str) -> dict[str, Any]:
    """What the linear layers of a block are fed on [batch, length] tokens, by path: arrays, or those of experts."""
    block = _block_shapes(architecture, kind, dtype)
    capture = partial(capture_block, architecture, kind, wanted=linear_paths(architecture, kind))
    return jax.eval_shape(capture, block, stream_shape(architecture, batch, length, dtype))


def cache_shapes(architecture: Architecture, batch: int, capacity: int, dtype: str = "float32") -> Any:
    """The key-value cache of one block."""
    return jax.eval_shape(lambda: architecture.init_cache(batch, capacity, dtype))


def _block_shapes(architecture: Architecture, kind: Hashable, dtype: str = "float32") -> Any:
    index = next(index for index in range(architecture.num_layers) if architecture.layer_kind(index) == kind)
    return float_shapes(architecture, dtype)["layers"][index]


def _temporaries(compiled: Any) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)
