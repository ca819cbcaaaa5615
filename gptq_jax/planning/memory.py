"""Memory that a model takes to run, and to quantize: the stages of `block.quantize_block`, one after another."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from gptq_jax.block import MEASURED_OUTPUTS
from gptq_jax.generate import PREFILL_CHUNK, cache_capacity
from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Architecture, input_groups
from gptq_jax.planning.compiled import cache_shapes, cached_bytes, forward_bytes, input_shapes, stream_shape
from gptq_jax.storage.store import tree_bytes
from gptq_jax.stream import KEPT_BYTES, STREAMED_BYTES
from gptq_jax.tensor import QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """Bytes to generate text.

    Attributes:
        weights: all parameters.
        cache: keys and values of every block, of as many tokens as generation makes room for.
        activations: the most that a block, or the logits, need besides.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True, kw_only=True)
class QuantizeMemory:
    """Bytes of arrays to quantize with GPTQ, at the stage that needs most.

    A process takes more: on a processor the interpreter, JAX and its compiler, and what the allocator keeps.

    Attributes:
        stage: its name, like "solve mlp.down_proj".
        activations: the residual stream of all calibration tokens, and the inputs of the block's layers that are kept.
        block: float and packed parameters of one block, Hessians, one batch, temporaries: what a device must hold,
            wherever the rest is.
        in_memory: all at once, where `quantize` is given a whole model and returns another.
    """

    stage: str
    activations: int
    block: int
    in_memory: int

    @property
    def total(self) -> int:
        """At once, as `quantize_blocks` and the command line go about it: block by block."""
        return self.activations + self.block


def run_memory(architecture: Architecture, params: Params, *, sequences: int, length: int, dtype: str) -> RunMemory:
    """Of a model with these parameters, shapes or arrays, that generates `sequences` of up to `length` tokens."""
    capacity = cache_capacity(length)
    tokens = min(PREFILL_CHUNK, length)
    x = stream_shape(architecture, sequences, tokens, dtype)
    blocks = [cached_bytes(architecture, kind, sequences, tokens, capacity) for kind in kinds(architecture)]
    logits = 2 * 4 * sequences * architecture.vocab_size
    return RunMemory(
        weights=tree_bytes(params),
        cache=architecture.num_layers * tree_bytes(cache_shapes(architecture, sequences, capacity, dtype)),
        activations=max(2 * tree_bytes(x) + max(blocks), logits),
    )


def quantize_memory(
    architecture: Architecture,
    floats: Params,
    packed: Params,
    *,
    samples: int,
    length: int,
    batch_size: int,
    dtype: str,
) -> QuantizeMemory:
    """Of quantizing `floats` into `packed`, both of shapes, with `samples` windows of `length` tokens."""
    stages = [
        stage
        for kind in kinds(architecture)
        for stage in _stages(architecture, kind, floats, packed, samples * length, (batch_size, length), dtype)
    ]
    whole = tree_bytes(floats) + tree_bytes(packed["layers"]) - _shared(floats, packed)
    most = max(stages, key=lambda stage: stage.activations(STREAMED_BYTES) + stage.block)
    return QuantizeMemory(
        stage=most.name,
        activations=most.activations(STREAMED_BYTES),
        block=most.block,
        # A model keeps the float kernels that are replaced one by one.
        in_memory=whole
        + max(stage.activations(KEPT_BYTES) + stage.block - stage.parameters + stage.replaced for stage in stages),
    )


def kinds(architecture: Architecture) -> list[object]:
    """The kinds of blocks there are, in order."""
    return list(dict.fromkeys(architecture.layer_kind(index) for index in range(architecture.num_layers)))


def kernel_of(block: Params, path: str) -> jax.ShapeDtypeStruct | QuantizedTensor:
    """The kernel of the layer at a dotted path of a block."""
    for name in path.split("."):
        block = block[name]
    return block["kernel"]


def solve_bytes(d_in: int, d_out: int) -> int:
    """Temporaries of the GPTQ solver, float32: the Hessian permuted and factored; the errors of the weights, and what
    is carried from block to block. XLA's own figure is at most a tenth more.
    """
    return int(4 * (1.9 * d_in * d_in + 2.9 * d_in * d_out))


def measure_bytes(d_in: int, d_out: int) -> int:
    """Temporaries of a layer's losses: half of the Hessian, in pieces; of some outputs at a time the weight on either
    grid, its errors, and these times the Hessian.
    """
    return int(4 * (0.58 * d_in * d_in + 16 * d_in * min(MEASURED_OUTPUTS, d_out)))


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is in memory at one stage.

    Attributes:
        name: of the stage.
        stream: bytes of the states between blocks.
        inputs: of layers, if all were kept.
        parameters: of the block, float and packed.
        replaced: of them, float kernels in whose place dequantized ones are.
        beside: all else.
    """

    name: str
    stream: int
    inputs: int
    parameters: int
    replaced: int
    beside: int

    @property
    def block(self) -> int:
        """All but the activations."""
        return self.parameters + self.beside

    def activations(self, budget: int) -> int:
        """With so many bytes of inputs kept."""
        return self.stream + min(budget, self.inputs)


def _stages(
    architecture: Architecture,
    kind: object,
    floats: Params,
    packed: Params,
    tokens: int,
    batch: tuple[int, int],
    dtype: str,
) -> Iterator[_Stage]:
    """What is in memory while the last block of a kind is quantized, true to `block.quantize_block`."""
    index = max(i for i in range(architecture.num_layers) if architecture.layer_kind(i) == kind)
    block, small = floats["layers"][index], packed["layers"][index]
    itemsize = np.dtype(dtype).itemsize
    x = stream_shape(architecture, *batch, dtype)
    width = x.shape[-1] * itemsize
    of_batch = batch[0] * batch[1]
    forward = forward_bytes(architecture, kind, *batch) + 2 * of_batch * width
    parameters = tree_bytes(block) + tree_bytes(small) - _shared({"layers": [block]}, {"layers": [small]})
    fed = input_shapes(architecture, kind, *batch, dtype)
    groups = [
        [path for path in group if isinstance(kernel_of(small, path), QuantizedTensor)]
        for group in input_groups(architecture, kind)
    ]
    stream = tokens * width
    inputs = replaced = before = 0
    for group in filter(None, groups):
        shapes = [kernel_of(block, path).shape for path in group]
        experts, d_in = math.prod(shapes[0][:-2]), shapes[0][-2]
        d_out = sum(shape[-1] for shape in shapes)
        hessian = 4 * d_in * d_in * (experts + (len(shapes[0]) > 2))  # experts share one besides
        captured = tree_bytes(fed[group[0]])
        inputs += captured * tokens // of_batch
        name = ", ".join(group)
        stage = partial(_Stage, stream=stream, inputs=inputs, parameters=parameters, replaced=replaced)
        yield stage(name=f"observe {name}", beside=before + hessian + captured + max(forward, 4 * d_in * d_in))
        alone = len(group) == 1 and dtype == "float32"  # then the kernel itself is solved, no copy
        weight = 0 if alone else 4 * experts * d_in * d_out
        yield stage(
            name=f"solve {name}",
            beside=hessian + weight + max(solve_bytes(d_in, d_out), measure_bytes(d_in, d_out)),
            parameters=parameters - replaced,  # their place is empty until the next inputs are computed
            replaced=0,
        )
        replaced += experts * d_in * d_out * itemsize
        before = hessian
    yield _Stage(
        name="run the block",
        stream=stream,
        inputs=inputs,
        parameters=parameters,
        replaced=replaced,
        beside=before + forward + 2 * tree_bytes(x),
    )


def _shared(floats: Params, packed: Params) -> int:
    """Bytes of the arrays of blocks that packing leaves as they are, which both trees hold."""
    return sum(
        tree_bytes(one)
        for one, other in zip(
            jax.tree.leaves(floats["layers"]),
            jax.tree.leaves(packed["layers"], is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)),
            strict=True,
        )
        if not isinstance(other, QuantizedTensor)
    )
