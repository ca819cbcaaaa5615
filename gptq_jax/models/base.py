"""A language model as embed -> blocks -> head, over parameters that are plain data.

Every forward pass is a Python loop over blocks, calling one compiled function for each kind of block: compile
time does not grow with depth, and a block's parameters may come from anywhere (memory, a file, a quantizer).
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Integer

from gptq_jax.hooks.low_rank import LORA
from gptq_jax.hooks.nnx import Input, Params, bind, float_layers, linear_layers, parameters, record_inputs
from gptq_jax.models.identity import digest_arrays, digest_json
from gptq_jax.models.quantizable import Calibration

Cache = Any  # a block's own pytree, made by Architecture.init_cache


@runtime_checkable
class Architecture(Protocol):
    """What kind of network it is: a frozen, hashable configuration, static under jit.

    Modules are made of shapes only (`nnx.eval_shape`); arrays come from the parameters.

    Attributes:
        num_layers: blocks.
        vocab_size: tokens are 0..vocab_size-1.
        context_length: the longest sequence the model was made for.
        tie_embeddings: the head reads the parameters of the embedding, as its submodule `embed`.
    """

    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def context_length(self) -> int: ...  # noqa: D102
    @property
    def tie_embeddings(self) -> bool: ...  # noqa: D102

    def __hash__(self) -> int: ...

    def layer_kind(self, index: int) -> Any:
        """A hashable; blocks of one kind share a compiled function."""

    def abstract_embed(self) -> nnx.Module:
        """Called with (tokens, positions), each [batch, time]; returns the residual stream [batch, time, d_model]."""

    def abstract_block(self, kind: Any) -> nnx.Module:
        """Called with (x, positions, cache, mask); returns the residual stream and the updated cache."""

    def abstract_head(self) -> nnx.Module:
        """Called with the residual stream; returns float32 logits [batch, time, vocab]."""

    def abstract_params(self) -> Params:
        """The tree of `Model.params`, as `jax.ShapeDtypeStruct`s."""

    def tensor_name(self, path: tuple[str | int, ...]) -> tuple[str, bool]:
        """The Hugging Face tensor of the leaf at `path` of `Model.params`, and whether it is transposed."""

    def init_cache(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache of one block for `capacity` tokens."""


@runtime_checkable
class Headed(Protocol):
    """What makes logits of a stream: all that evaluation needs of an architecture once a model has run."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    def __hash__(self) -> int: ...

    def abstract_head(self) -> nnx.Module:
        """Called with the stream; returns float32 logits [batch, time, vocab]."""


@dataclass(frozen=True)
class BlockForward:
    """How a block of a supplied architecture runs; the state is the residual stream [batch, time, d_model]."""

    config: Any
    kind: Any

    def run(self, params: Params, state: Any, mask: Any, known: Mapping[str, Any]) -> Any:
        """See `run_block`."""
        return run_block(self.config, self.kind, params, state, mask=mask, known=known)[0]

    def capture(
        self, params: Params, state: Any, wanted: tuple[str, ...], mask: Any, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `capture_block`."""
        return capture_block(self.config, self.kind, params, state, wanted, mask=mask, known=known)

    def rows(self, state: Any, path: str) -> int:
        """Every layer sees every token."""
        return state.shape[0] * state.shape[1]


@dataclass(frozen=True, kw_only=True)
class ArchitectureBlock:
    """A block of a supplied architecture; see `quantizable.Block`.

    Attributes:
        forward: how it runs.
        prefix: of its layers' paths.
        read: gives its parameters: those of a model, or read from a file.
    """

    forward: BlockForward
    prefix: str
    read: Callable[[], Params]

    @property
    def params(self) -> Params:
        """What `read` gives."""
        return self.read()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """See `input_groups`."""
        return input_groups(self.forward.config, self.forward.kind)


@dataclass(frozen=True)
class Model:
    """A language model, float or quantized; call it with tokens [batch, time] for float32 logits.

    Attributes:
        config: the architecture.
        params: {"embed": ..., "layers": [one for each block], "head": ...}, each nested dicts of arrays and,
            where a kernel is quantized, QuantizedTensors.
        tokenizer: a transformers fast tokenizer, or None.
        source: the checkpoint's own config (Hugging Face names), kept for saving and exporting.
        report: the quantization report as JSON data, or None for a float model.
    """

    config: Any
    params: Params
    tokenizer: Any = None
    source: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None

    def __call__(self, tokens: Any) -> Float[Array, "batch time vocab"]:
        """Float32 logits of the token after each.

        Args:
            tokens: integers [batch, time].

        Raises:
            ValueError: tokens of another rank or dtype, none at all, or outside the vocabulary.
        """
        tokens = check_tokens(tokens, self.config.vocab_size)
        return head(self.config, self.params, hidden_states(self, tokens))

    def blocks(self) -> list[ArchitectureBlock]:
        """The blocks with their parameters."""
        return blocks_of(self.config, lambda index: self.params["layers"][index])

    def calibration(self, calls: Sequence[Any], masks: Sequence[Any]) -> Calibration:
        """The model block by block on tokens; see `calibrate`.

        Raises:
            ValueError: also if the model has adapters beside its layers.
        """
        check_no_lora(self, "quantized")
        return calibrate(
            self.config,
            calls,
            masks,
            embedding=lambda: self.params["embed"],
            block=lambda index: self.params["layers"][index],
            heading=lambda: self.params["head"],
            assemble=lambda packed, report: replace(
                self, params={**self.params, "layers": list(packed)}, report=report
            ),
        )

    def identity(self) -> dict[str, str]:
        """What tells this model from another; see `quantizable.BlockModel`."""
        return {"config": digest_json(self.source), "weights": digest_arrays(self.params)}


def blocks_of(config: Architecture, read: Callable[[int], Params]) -> list[ArchitectureBlock]:
    """The blocks of an architecture; `read` gives the parameters of each by its index."""
    return [
        ArchitectureBlock(
            forward=BlockForward(config, config.layer_kind(index)),
            prefix=f"layers.{index}.",
            read=partial(read, index),
        )
        for index in range(config.num_layers)
    ]


def calibrate(
    config: Architecture,
    calls: Sequence[Any],
    masks: Sequence[Any],
    *,
    embedding: Callable[[], Params],
    block: Callable[[int], Params],
    heading: Callable[[], Params],
    assemble: Callable[[Sequence[Params], dict[str, Any]], Any],
) -> Calibration:
    """A supplied architecture block by block, its parameters read when they are needed.

    Args:
        config: the architecture.
        calls: tokens, each [batch, time] integers.
        masks: for each, True for real tokens; None if all are.
        embedding: gives the parameters of the embedding.
        block: gives those of one block.
        heading: gives those of the head, less the embedding where it is tied.
        assemble: as `Calibration.assemble`.

    Raises:
        ValueError: bad tokens, batches beyond the context, or a mask of another shape.
    """
    tokens = [check_tokens(rows, config.vocab_size) for rows in calls]
    real = [None if mask is None else jnp.asarray(mask, bool) for mask in masks]
    for batch, mask in zip(tokens, real, strict=True):
        if batch.shape[1] > config.context_length:
            raise ValueError(
                f"batches of {batch.shape[1]} tokens exceed the model's context of {config.context_length}."
            )
        if mask is not None and mask.shape != batch.shape:
            raise ValueError(f"mask has shape {mask.shape}, but its tokens {batch.shape}.")

    def start() -> Iterator[Array]:
        params = {"embed": embedding()}
        return (embed(config, params, batch) for batch in tokens)

    def head_of() -> tuple[Architecture, Params]:
        parts = {"head": heading(), **({"embed": embedding()} if config.tie_embeddings else {})}
        return config, head_params(config, parts)

    blocks = blocks_of(config, block)
    return Calibration(
        blocks=blocks,
        start=start,
        masks=real,
        kept_float={
            **{
                f"{each.prefix}{path}": reason
                for each in blocks
                for path, reason in float_layers(config.abstract_block(each.forward.kind)).items()
            },
            "embed": "a lookup table, not a product",
            "head": "reads the embedding" if config.tie_embeddings else "the output head stays float",
        },
        assemble=assemble,
        head=head_of,
    )


def hidden_states(model: Model, tokens: Int32[Array, "batch time"]) -> Float[Array, "batch time d_model"]:
    """The residual stream after the last block."""
    x = embed(model.config, model.params, tokens)
    for index, block_params in enumerate(model.params["layers"]):
        x, _ = run_block(model.config, model.config.layer_kind(index), block_params, x)
    return x


def check_no_lora(model: Model, action: str) -> None:
    """Raise ValueError where adapters are beside layers, which `action` would lose."""
    if any(LORA in block for block in model.params["layers"]):
        raise ValueError(
            f"the model carries LoRA adapters, and cannot be {action}: take the model without them, and store them by "
            "save_lora, or merge_lora first."
        )


def check_tokens(tokens: Any, vocab_size: int) -> Int32[Array, "batch time"]:
    """`tokens` as an int32 array, or ValueError saying what is wrong with them."""
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tokens.shape}: pass [batch, time].")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are {tokens.dtype}: pass integers.")
    if tokens.size == 0:
        raise ValueError(f"tokens have shape {tokens.shape}: pass at least one.")
    if not isinstance(tokens, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # known tokens may meet traced parameters
            low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens span {low}..{high}, but the vocabulary is 0..{vocab_size - 1}.")
    return jnp.asarray(tokens, jnp.int32)


def embed(
    config: Architecture,
    params: Params,
    tokens: Integer[Array, "batch time"],
    positions: Int32[Array, "#batch time"] | None = None,
) -> Float[Array, "batch time d_model"]:
    """The residual stream before the first block.

    Args:
        config: the architecture.
        params: with at least the entry "embed".
        tokens: within the vocabulary.
        positions: of the tokens, within the model's context; None for 0, 1, ...
    """
    return _embed(config, params["embed"], tokens, positions)


def run_block(
    config: Architecture,
    kind: Hashable,
    block_params: Params,
    x: Float[Array, "batch time d_model"],
    positions: Int32[Array, "#batch time"] | None = None,
    cache: Cache = None,
    mask: Bool[Array, "batch time"] | None = None,
    known: Mapping[str, Input] | None = None,
) -> tuple[Float[Array, "batch time d_model"], Cache]:
    """The residual stream after a block, and the updated cache (None if there is none).

    Args:
        config: the architecture.
        kind: the block's `layer_kind`.
        block_params: the parameters of this block.
        x: the residual stream before it.
        positions: of the tokens; None for 0, 1, ... With a cache: consecutive, the same in the whole batch.
        cache: what earlier tokens left. It is donated: use the one returned.
        mask: True for real tokens, False for padding, which no token attends to. Not with a cache.
        known: inputs of linear layers, of `capture_block`, that need not be computed again.
    """
    if cache is not None and mask is not None:
        raise ValueError("mask and cache cannot be combined: cached tokens are all real.")
    return _run_block(config, kind, block_params, x, positions, cache, mask, dict(known or {}))


def capture_block(
    config: Architecture,
    kind: Hashable,
    block_params: Params,
    x: Float[Array, "batch time d_model"],
    wanted: tuple[str, ...],
    mask: Bool[Array, "batch time"] | None = None,
    known: Mapping[str, Input] | None = None,
) -> dict[str, Input]:
    """The inputs of the linear layers `wanted`, [batch, time, d_in] or Routed; nothing they do not need is computed.

    To walk through a block layer by layer, pass what was captured so far as `known`: with the input of o_proj
    known, the attention before it is not computed again.

    Args:
        config: the architecture.
        kind: the block's `layer_kind`.
        block_params: the parameters of this block.
        x: the residual stream before it.
        wanted: paths of linear layers, of `linear_paths`.
        mask: True for real tokens, False for padding.
        known: inputs of linear layers captured earlier, for this same `x`.
    """
    unknown = set(wanted) - set(linear_paths(config, kind))
    if unknown:
        raise ValueError(f"no linear layer {sorted(unknown)}: the block has {list(linear_paths(config, kind))}.")
    return _capture_block(config, kind, block_params, x, mask, wanted, dict(known or {}))


def head(
    config: Architecture, params: Params, x: Float[Array, "batch time d_model"]
) -> Float[Array, "batch time vocab"]:
    """Float32 logits from the residual stream.

    Args:
        config: the architecture.
        params: with at least the entry "head", and "embed" where it is tied.
        x: the residual stream after the last block.
    """
    return apply_head(config, head_params(config, params), x)


def head_params(config: Architecture, params: Params) -> Params:
    """All that the head reads, out of `Model.params`."""
    return {**params["head"], "embed": params["embed"]} if config.tie_embeddings else params["head"]


@lru_cache
def input_groups(config: Architecture, kind: Hashable) -> tuple[tuple[str, ...], ...]:
    """The linear layers of a block in the order they run, those fed by the same array together.

    Raises:
        ValueError: a linear layer is never called, so nothing could calibrate it.
    """
    abstract = config.abstract_block(kind)
    groups: dict[int, list[str]] = {}

    def trace(block_params: Params, x: Array) -> tuple[Array, Cache]:
        module = bind(abstract, block_params)
        layers = linear_layers(module)
        tape = record_inputs(module)
        out = module(x, _default_positions(x), None, None)  # type: ignore[operator]
        for path, value in tape.items():  # all alive, so an id is one tracer
            groups.setdefault(id(value), []).append(path)
        if unused := sorted(set(layers) - set(tape)):
            raise ValueError(f"linear layers {unused} of the block are never called: they cannot be calibrated.")
        return out

    x = jax.eval_shape(
        partial(_embed, config), parameters(config.abstract_embed()), jax.ShapeDtypeStruct((1, 2), jnp.int32), None
    )
    jax.eval_shape(trace, parameters(abstract), x)
    return tuple(tuple(group) for group in groups.values())


def linear_paths(config: Architecture, kind: Hashable) -> tuple[str, ...]:
    """The linear layers of a block, like "mlp.down_proj", in the order they run."""
    return tuple(path for group in input_groups(config, kind) for path in group)


def _default_positions(x: Array) -> Int32[Array, "1 time"]:
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


@lru_cache
def _abstract_block(config: Architecture, kind: Hashable) -> nnx.Module:
    return config.abstract_block(kind)


@partial(jax.jit, static_argnums=0)
def _embed(config: Architecture, params: Params, tokens: Array, positions: Array | None) -> Array:
    positions = _default_positions(tokens) if positions is None else positions
    return bind(config.abstract_embed(), params)(tokens, positions)  # type: ignore[operator]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _run_block(
    config: Architecture,
    kind: Hashable,
    block_params: Params,
    x: Array,
    positions: Array | None,
    cache: Cache,
    mask: Array | None,
    known: dict[str, Input],
) -> tuple[Array, Cache]:
    module = bind(_abstract_block(config, kind), block_params)
    if known:
        record_inputs(module, known)
    positions = _default_positions(x) if positions is None else positions
    return module(x, positions, cache, mask)  # type: ignore[operator]


@partial(jax.jit, static_argnums=(0, 1, 5))
def _capture_block(
    config: Architecture,
    kind: Hashable,
    block_params: Params,
    x: Array,
    mask: Array | None,
    wanted: tuple[str, ...],
    known: dict[str, Input],
) -> dict[str, Input]:
    module = bind(_abstract_block(config, kind), block_params)
    tape = record_inputs(module, known)
    module(x, _default_positions(x), None, mask)  # type: ignore[operator]
    return {path: tape[path] for path in wanted}


@partial(jax.jit, static_argnums=0)
def apply_head(config: Headed, params: Params, x: Float[Array, "batch time d_model"]) -> Array:
    """`head`, given what `head_params` returns."""
    return bind(config.abstract_head(), params)(x)  # type: ignore[operator]
