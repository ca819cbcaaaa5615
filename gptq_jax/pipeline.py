"""Quantize a model in memory, block by block."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from gptq_jax.block import BlockTask, Clock, quantize_block
from gptq_jax.calibration import Batch
from gptq_jax.hooks.nnx import float_layers
from gptq_jax.methods.base import Method
from gptq_jax.methods.gptq import gptq
from gptq_jax.models.base import Architecture, Model, check_no_lora, check_tokens, embed, linear_paths
from gptq_jax.report import LayerReport, Report, peak_memory
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.api import PreparedWeight

OnLayer = Callable[[LayerReport, int, int], None]  # the layer's report, layers done, layers in all


def quantize(
    model: Model,
    batches: Sequence[Any],
    spec: QuantSpec | SpecRules | None = None,
    method: Method | None = None,
    *,
    true_sequential: bool = True,
    min_expert_tokens: int | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[Model, Report]:
    """Quantize the linear layers of every block; embedding, norms and head stay float.

    Each layer is solved for the inputs that its quantized predecessors give it.

    Args:
        model: a float model.
        batches: calibration tokens, each [batch, time] integers or a `calibration.Batch` with a padding mask.
        spec: the grid of all layers, or rules that choose one for each path; 4 bits in groups of 128 if None.
        method: `gptq()` if None.
        true_sequential: predecessors inside the block count too (q, k, v; then o; then gate and up; then
            down), not only earlier blocks.
        min_expert_tokens: experts that saw fewer tokens are solved with the statistics of all tokens of their
            layer; None: twice as many as the layer has inputs, see `statistics.ROWS_PER_INPUT`.
        on_layer: called after each layer.

    Returns:
        The model with packed weights, and the report.

    Raises:
        ValueError: before the long work where it can be known: no batches, bad tokens, weights that are not
            finite or quantized already, rules that match nothing; during it, by name: a layer whose inputs are
            not finite, are all zero, or are not as many as the calibration tokens.
    """
    method = gptq() if method is None else method
    rules = spec if isinstance(spec, SpecRules) else SpecRules(default=spec or QuantSpec())
    rules = replace(rules, default=replace(rules.default, scale_dtype=rules.default.scale_dtype or "float16"))
    tokens, masks = _split_batches(batches, model.config)
    if min_expert_tokens is not None and min_expert_tokens < 0:
        raise ValueError(f"min_expert_tokens={min_expert_tokens} must not be negative; 0 for each expert by itself.")
    if not tokens:
        raise ValueError("batches is empty: pass at least one array of calibration tokens [batch, time].")
    specs = layer_specs(model, rules)
    check_no_lora(model, "quantized")
    check_weights(model)

    total = sum(spec is not None for spec in specs.values())
    layers: list[LayerReport] = []

    def done(report: LayerReport) -> None:
        layers.append(report)
        if on_layer is not None:
            on_layer(report, len(layers), total)

    clock = Clock()
    with clock("forward") as ready:
        stream = ready([embed(model.config, model.params, batch) for batch in tokens])
    blocks = []
    for index, params in enumerate(model.params["layers"]):
        kind, prefix = model.config.layer_kind(index), f"layers.{index}."
        task = BlockTask(
            config=model.config,
            kind=kind,
            prefix=prefix,
            specs={path: specs[prefix + path] for path in linear_paths(model.config, kind)},
            method=method,
            masks=masks,
            min_expert_tokens=min_expert_tokens,
            clock=clock,
        )
        packed, stream = quantize_block(task, params, stream, true_sequential=true_sequential, done=done)
        blocks.append(packed)
    report = Report(
        layers=tuple(layers),
        kept_float=_kept_float(model, specs),
        seconds=dict(clock.seconds),
        settings={
            "method": method.name,
            **dict(method.settings),
            "true_sequential": true_sequential,
            **({} if min_expert_tokens is None else {"min_expert_tokens": min_expert_tokens}),
        },
        peak_bytes=peak_memory(),
    )
    return replace(model, params={**model.params, "layers": blocks}, report=report.to_json()), report


def layer_specs(model: Model, rules: SpecRules) -> dict[str, QuantSpec | None]:
    """The grid of each linear layer of every block by path, None where it is skipped.

    Raises:
        ValueError: a rule matches no layer, all layers are skipped, or the model is quantized already.
    """
    config = model.config
    paths = [
        f"layers.{index}.{path}"
        for index in range(config.num_layers)
        for path in linear_paths(config, config.layer_kind(index))
    ]
    rules.check_used(paths)
    if is_quantized(model):
        raise ValueError("the model is quantized already: load the float one it was made from.")
    specs = {path: rules.spec_for(path) for path in paths}
    if all(spec is None for spec in specs.values()):
        raise ValueError(f"skip={list(rules.skip)} leaves no layer to quantize.")
    return specs


def is_quantized(model: Model) -> bool:
    """Whether any kernel is packed, as it is stored or prepared to run."""
    packed = QuantizedTensor | PreparedWeight
    leaves = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, packed))
    return any(isinstance(leaf, packed) for leaf in leaves)


def check_weights(model: Model) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if not bool(_all_finite(leaf)):
            name = re.sub(r"\W+", ".", jax.tree_util.keystr(path)).strip(".")
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its dtype too narrow.")


@jax.jit
def _all_finite(leaf: Any) -> Any:
    return jnp.all(jnp.isfinite(leaf))


def _split_batches(
    batches: Sequence[Any], config: Architecture
) -> tuple[list[Int32[Array, "batch time"]], list[Bool[Array, "batch time"] | None]]:
    """The tokens and the padding mask of each batch, checked."""
    tokens: list[Array] = []
    masks: list[Array | None] = []
    for batch in batches:
        rows, mask = batch if isinstance(batch, Batch) else (batch, None)
        tokens.append(check_tokens(rows, config.vocab_size))
        shape = tokens[-1].shape
        if shape[1] > config.context_length:
            raise ValueError(f"batches of {shape[1]} tokens exceed the model's context of {config.context_length}.")
        real = None if mask is None else jnp.asarray(mask, bool)
        if real is not None and real.shape != shape:
            raise ValueError(f"mask has shape {real.shape}, but its tokens {shape}.")
        masks.append(real)
    return tokens, masks


def _kept_float(model: Model, specs: dict[str, QuantSpec | None]) -> dict[str, str]:
    """Matrices left float, and why."""
    kept = {path: "skipped by a rule" for path, spec in specs.items() if spec is None}
    kept |= {
        f"layers.{index}.{path}": reason
        for index in range(model.config.num_layers)
        for path, reason in float_layers(model.config.abstract_block(model.config.layer_kind(index))).items()
    }
    kept["embed"] = "a lookup table, not a product"
    kept["head"] = "reads the embedding" if model.config.tie_embeddings else "the output head stays float"
    return kept
