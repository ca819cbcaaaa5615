"""Perplexity, and how far a model's next-token distribution is from another's; on one device or many."""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from gptq_jax.models.adapted import AdaptedModel
from gptq_jax.models.base import (
    Architecture,
    Headed,
    Model,
    Params,
    apply_head,
    check_tokens,
    embed,
    head_params,
    run_block,
)
from gptq_jax.models.logits import logits, logits_config
from gptq_jax.parallel import DataParallel, choose_devices, is_cut, make_mesh

_LOGITS_AT_ONCE = 2**24  # elements: 64 MB in float32


@dataclass(frozen=True)
class Comparison:
    """How `compare`'s model and the other one differ on a text.

    Attributes:
        perplexity: of the model.
        other_perplexity: of the other.
        kl: mean over predicted tokens of KL(other || model), in nats.
        top1_agreement: fraction of predicted tokens for which both find the same token likeliest.
    """

    perplexity: float
    other_perplexity: float
    kl: float
    top1_agreement: float


class Reference:
    """A model that many are compared with on one text: what its head takes is computed once, and kept.

    Pass it where `compare` takes the other model, or `perplexity` its model.

    Args:
        model: e.g. the float one. A module of one's own keeps logits, which are larger.
        keep_bytes: as much is kept, in the memory of the devices; the rest is computed each time.
    """

    def __init__(self, model: Model | AdaptedModel, *, keep_bytes: int = 2**30):
        self.model = model
        self._keeps, self._left = keep_bytes > 0, keep_bytes
        self._kept: dict[Hashable, Array] = {}

    def hidden_states(
        self, where: DataParallel, model: Model | AdaptedModel, tokens: Int32[Array, "..."]
    ) -> Float[Array, "..."]:
        """What the head takes for these tokens; `model` is this one, its parameters where they are wanted."""
        if not self._keeps:
            return _hidden_states(where, model, tokens)
        key = (where, where.gather(tokens).tobytes())
        if key not in self._kept:
            states = _hidden_states(where, model, tokens)
            if states.nbytes > self._left:
                return states
            self._left -= states.nbytes
            self._kept[key] = states
        return self._kept[key]


def perplexity(
    model: Model | AdaptedModel | Reference,
    text_or_tokens: str | Any,
    *,
    length: int = 2048,
    batch_size: int = 1,
    parallel: str = "jit",
    devices: int | Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> float:
    """Perplexity by the protocol of the GPTQ paper (arXiv:2210.17323).

    The text is one stream of tokens, cut into windows that do not overlap; the remainder is dropped. In each
    window all tokens but the first are predicted: exp of the mean negative log-likelihood over all of those.

    Args:
        model: float or quantized; of a module of one's own, one that is called with tokens alone.
        text_or_tokens: a text, which needs the model's tokenizer, or tokens [time].
        length: tokens in a window.
        batch_size: windows run at once on each device; changes speed and memory only, as the next two do.
        parallel: "jit": one program for a mesh of devices; "pmap": by `jax.pmap`. Either way each device has all
            parameters, and windows of its own.
        devices: how many of this process's devices, or which; None for all of them. A model whose parameters are cut
            over devices runs on its own mesh, all windows of a batch together: it takes neither of the last two.
        progress: show a progress bar on the terminal's error stream.

    Raises:
        ValueError: fewer tokens than a window, a window longer than the model's context, bad tokens, logits that
            are not finite, an unknown `parallel`, devices that there are not, or devices for a model that is cut.
    """
    reference = _reference(model)
    model = reference.model
    where = data_parallel(parallel, devices, model.params)
    config = _config(model, length)
    windows = _windows(model, config, text_or_tokens, length, batch_size)
    model = replace(model, params=where.replicate(model.params))
    losses = []
    for batch, real in _batches(windows, batch_size, where, progress, "perplexity"):
        x = reference.hidden_states(where, model, batch)
        params = _head_params(config, model)
        losses.append(where.gather(where.run(_losses, config, params=params, batches=(x, batch)))[:real])
    return math.exp(_mean(np.concatenate(losses), "the model's logits"))


def compare(
    model: Model | AdaptedModel,
    other: Model | AdaptedModel | Reference,
    text_or_tokens: str | Any,
    *,
    length: int = 2048,
    batch_size: int = 1,
    parallel: str = "jit",
    devices: int | Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Comparison:
    """Both perplexities, and the distance between the next-token distributions.

    Args:
        model: e.g. the quantized one. Its tokenizer reads the text.
        other: e.g. the float one it came from; a `Reference` to it where several are compared with it.
        text_or_tokens: as for `perplexity`.
        length: tokens in a window.
        batch_size, parallel, devices, progress: as for `perplexity`.

    Raises:
        ValueError: as for `perplexity`, or the vocabularies differ in size, or one model is cut over devices and the
            other is elsewhere.
    """
    reference = _reference(other)
    other = reference.model
    configs = _config(model, length), _config(other, length)
    if len({config.vocab_size for config in configs}) > 1:
        raise ValueError(
            f"the models' vocabularies hold {configs[0].vocab_size} and {configs[1].vocab_size} tokens: "
            "only models with the same vocabulary can be compared."
        )
    where = data_parallel(parallel, devices, (model.params, other.params))
    windows = _windows(model, configs[0], text_or_tokens, length, batch_size)
    _check_length(configs[1], length)
    model, other = (replace(each, params=where.replicate(each.params)) for each in (model, other))
    params = tuple(_head_params(config, each) for config, each in zip(configs, (model, other), strict=True))
    rows = []
    for batch, real in _batches(windows, batch_size, where, progress, "comparison"):
        streams = _hidden_states(where, model, batch), reference.hidden_states(where, other, batch)
        rows.append(where.gather(where.run(_differences, *configs, params=params, batches=(*streams, batch)))[:real])
    loss, other_loss, kl, agreement = np.moveaxis(np.concatenate(rows), -1, 0)
    return Comparison(
        perplexity=math.exp(_mean(loss, "the model's logits")),
        other_perplexity=math.exp(_mean(other_loss, "the other model's logits")),
        kl=_mean(kl, "the KL divergence"),
        top1_agreement=_mean(agreement, "the agreement"),
    )


def data_parallel(parallel: str, devices: int | Sequence[jax.Device] | None, params: Any) -> DataParallel:
    """Where an evaluation runs; arguments and errors are those of `perplexity`."""
    DataParallel(None, parallel)  # its name first
    if not is_cut(params):
        return DataParallel(make_mesh(choose_devices(devices)), parallel)
    if devices is not None or parallel != "jit":
        raise ValueError(
            "the parameters are cut over devices, and devices= and parallel='pmap' would copy all of them to each: "
            "leave both out."
        )
    places = {frozenset(leaf.sharding.device_set) for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)}
    if len(places) > 1:
        raise ValueError("the models are on different devices: load both with one mesh.")
    return DataParallel(None, parallel)


def _reference(model: Model | AdaptedModel | Reference) -> Reference:
    return model if isinstance(model, Reference) else Reference(model, keep_bytes=0)


def _config(model: Model | AdaptedModel, length: int) -> Any:
    return logits_config(model, length) if isinstance(model, AdaptedModel) else model.config


def _head_params(config: Any, model: Model | AdaptedModel) -> Params:
    return {} if isinstance(model, AdaptedModel) else head_params(config, model.params)


def _hidden_states(
    where: DataParallel, model: Model | AdaptedModel, tokens: Int32[Array, "..."]
) -> Float[Array, "..."]:
    """What the head takes: the residual stream after the last block, or a module's logits; each device its rows."""
    if isinstance(model, AdaptedModel):
        return where.run(logits, params=model, batches=(tokens,))
    config = model.config
    x = where.run(_embed, config, params=model.params["embed"], batches=(tokens,))
    for index, block_params in enumerate(model.params["layers"]):
        x = where.run(_block, config, config.layer_kind(index), params=block_params, batches=(x,))
    return x


def _embed(
    config: Architecture, params: Params, tokens: Int32[Array, "batch time"]
) -> Float[Array, "batch time d_model"]:
    return embed(config, {"embed": params}, tokens)


def _block(
    config: Architecture, kind: Hashable, params: Params, x: Float[Array, "batch time d_model"]
) -> Float[Array, "batch time d_model"]:
    return run_block(config, kind, params, x)[0]


def _windows(
    model: Model | AdaptedModel, config: Any, text_or_tokens: str | Any, length: int, batch_size: int
) -> Int32[np.ndarray, "n length"]:
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a window predicts each token but its first.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    _check_length(config, length)
    tokens = text_or_tokens
    if isinstance(tokens, str):
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: pass tokens instead of a text, or give it one.")
        tokens = model.tokenizer(tokens, verbose=False)["input_ids"]
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"the tokens have shape {tokens.shape}: pass one stream [time].")
    count = tokens.size // length
    if not count:
        raise ValueError(f"the text has {tokens.size} tokens, less than one window: use a longer text or length.")
    return np.asarray(check_tokens(tokens[: count * length].reshape(count, length), config.vocab_size))


def _check_length(config: Any, length: int) -> None:
    if length > config.context_length:
        raise ValueError(f"length={length} is more than the model's context_length={config.context_length}.")


def _batches(
    windows: Int32[np.ndarray, "n length"], batch_size: int, where: DataParallel, progress: bool, title: str
) -> Iterator[tuple[Int32[Array, "..."], int]]:
    """Batches of one shape, cut over devices, each with the number of its real windows.

    The last is filled up with repeats, which come after the real ones and enter no mean.
    """
    from rich.console import Console
    from rich.progress import Progress

    batch_size = where.size * min(batch_size, -(-len(windows) // where.size))
    with Progress(console=Console(stderr=True)) if progress else nullcontext() as bar:
        task = bar.add_task(title, total=len(windows)) if bar else None
        for start in range(0, len(windows), batch_size):
            chosen = np.arange(start, start + batch_size)
            real = min(batch_size, len(windows) - start)
            yield where.shard(windows[chosen % len(windows)]), real
            if bar is not None and task is not None:
                bar.update(task, advance=real)


def _mean(values: np.ndarray, what: str) -> float:
    mean = float(values.mean(dtype=np.float64))
    if not math.isfinite(mean):
        window = int(np.argmin(np.isfinite(values).all(axis=-1)))
        raise ValueError(f"{what} are not finite in window {window}: the parameters hold NaN, infinity or huge values.")
    return mean


@partial(jax.jit, static_argnums=0)
def _losses(
    config: Headed,
    params: Params,
    x: Float[Array, "batch time d_model"],
    tokens: Int32[Array, "batch time"],
) -> Float[Array, "batch predicted"]:
    """Negative log-likelihood of each token after the first."""

    def piece(inputs: tuple[Array, Array]) -> Array:
        x, target = inputs
        return _negative_log_likelihood(apply_head(config, params, x[None])[0], target)

    return by_pieces(piece, config.vocab_size, (x[:, :-1], tokens[:, 1:]))


@partial(jax.jit, static_argnums=(0, 1))
def _differences(
    config: Headed,
    other_config: Headed,
    params: tuple[Params, Params],
    x: Float[Array, "batch time d_model"],
    other_x: Float[Array, "batch time d_other"],
    tokens: Int32[Array, "batch time"],
) -> Float[Array, "batch predicted 4"]:
    """Both losses, KL(other || model), and whether the likeliest tokens agree, for each predicted token."""

    def piece(inputs: tuple[Array, Array, Array]) -> Array:
        x, other_x, target = inputs
        logits = apply_head(config, params[0], x[None])[0]
        other_logits = apply_head(other_config, params[1], other_x[None])[0]
        log_p, log_q = jax.nn.log_softmax(other_logits), jax.nn.log_softmax(logits)
        agree = jnp.argmax(logits, -1) == jnp.argmax(other_logits, -1)
        return jnp.stack(
            [
                _negative_log_likelihood(logits, target),
                _negative_log_likelihood(other_logits, target),
                jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
                agree.astype(jnp.float32),
            ],
            axis=-1,
        )

    return by_pieces(piece, 2 * config.vocab_size, (x[:, :-1], other_x[:, :-1], tokens[:, 1:]))


def _negative_log_likelihood(logits: Float[Array, "n vocab"], target: Int32[Array, "n"]) -> Float[Array, "n"]:
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def by_pieces(function: Any, width: int, arrays: tuple[Array, ...]) -> Array:
    """Map `function` over pieces of [batch, time, ...] arrays, so that [batch, time, width] never exists."""
    batch, time = arrays[0].shape[:2]
    flat = [array.reshape(batch * time, *array.shape[2:]) for array in arrays]
    size = max(1, min(batch * time, _LOGITS_AT_ONCE // width))
    count = -(-batch * time // size)
    size = -(-batch * time // count)  # even pieces: little padding
    padding = count * size - batch * time
    pieces = [
        jnp.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1))).reshape(count, size, *array.shape[1:])
        for array in flat
    ]
    out = jax.lax.map(function, tuple(pieces))
    return out.reshape(count * size, *out.shape[2:])[: batch * time].reshape(batch, time, *out.shape[2:])
