"""Quantize a model in memory, block by block."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gptq_jax.block import BlockTask, Clock, quantize_block
from gptq_jax.calibration import Batch
from gptq_jax.matmul import is_packed
from gptq_jax.methods.base import Method
from gptq_jax.methods.gptq import gptq
from gptq_jax.models.base import Model
from gptq_jax.models.quantizable import BlockModel, Calibration
from gptq_jax.report import LayerReport, Report, peak_memory
from gptq_jax.spec import QuantSpec, SpecRules

Quantizable = TypeVar("Quantizable", bound=BlockModel)
QUANTIZED = "the model is quantized already: load the float one it was made from."
OnLayer = Callable[[LayerReport, int, int], None]  # the layer's report, layers done, layers in all


def quantize(
    model: Quantizable,
    batches: Sequence[Any],
    spec: QuantSpec | SpecRules | None = None,
    method: Method | None = None,
    *,
    true_sequential: bool = True,
    min_expert_tokens: int | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[Quantizable, Report]:
    """Quantize the linear layers of every block; embedding, norms and head stay float.

    Each layer is solved for the inputs that its quantized predecessors give it.

    Args:
        model: a float model, of `load` or `adapt`.
        batches: calibration tokens, each [batch, time] integers or a `calibration.Batch` with a padding mask; for
            an adapted module what it is called with: an array, a tuple of arguments, or a dict of keyword
            arguments, or a Batch of those and a mask, which then counts for the statistics only.
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
    if min_expert_tokens is not None and min_expert_tokens < 0:
        raise ValueError(f"min_expert_tokens={min_expert_tokens} must not be negative; 0 for each expert by itself.")
    if not batches:
        raise ValueError("batches is empty: pass at least one array of calibration tokens [batch, time].")
    if is_quantized(model):
        raise ValueError(QUANTIZED)
    pairs = [batch if isinstance(batch, Batch) else Batch(batch) for batch in batches]
    calibration = model.calibration([batch.tokens for batch in pairs], [batch.mask for batch in pairs])
    specs = block_specs(calibration, rules)
    check_weights(model)

    total = sum(spec is not None for spec in specs.values())
    layers: list[LayerReport] = []

    def done(report: LayerReport) -> None:
        layers.append(report)
        if on_layer is not None:
            on_layer(report, len(layers), total)

    clock = Clock()
    with clock("forward") as ready:
        stream = ready(calibration.start())
    blocks = []
    for block in calibration.blocks:
        task = BlockTask(
            block=block,
            specs={path: specs[block.prefix + path] for group in block.groups for path in group},
            method=method,
            masks=calibration.masks,
            min_expert_tokens=min_expert_tokens,
            clock=clock,
        )
        packed, stream = quantize_block(task, block.params, stream, true_sequential=true_sequential, done=done)
        blocks.append(packed)
    skipped = {path: "skipped by a rule" for path, spec in specs.items() if spec is None}
    report = Report(
        layers=tuple(layers),
        kept_float={**skipped, **calibration.kept_float},
        seconds=dict(clock.seconds),
        settings={
            "method": method.name,
            **dict(method.settings),
            "true_sequential": true_sequential,
            **({} if min_expert_tokens is None else {"min_expert_tokens": min_expert_tokens}),
        },
        peak_bytes=peak_memory(),
    )
    return calibration.assemble(blocks, report.to_json()), report


def layer_specs(model: Model, rules: SpecRules) -> dict[str, QuantSpec | None]:
    """The grid of each linear layer of every block by path, None where it is skipped.

    Raises:
        ValueError: a rule matches no layer, all layers are skipped, or the model is quantized already.
    """
    if is_quantized(model):
        raise ValueError(QUANTIZED)
    return block_specs(model.calibration([], []), rules)


def block_specs(calibration: Calibration, rules: SpecRules) -> dict[str, QuantSpec | None]:
    """The grid of each layer by full path, None where it is skipped.

    Raises:
        ValueError: a rule matches no layer, all layers are skipped, or one cannot be packed as it is asked for.
    """
    paths = [block.prefix + path for block in calibration.blocks for group in block.groups for path in group]
    rules.check_used([*paths, *calibration.refused], calibration.kept_float)
    specs = {path: rules.spec_for(path) for path in (*paths, *calibration.refused)}
    for path, reason in calibration.refused.items():
        if specs[path] is not None:
            raise ValueError(f"{path}: {reason}; leave it float by SpecRules(skip=({re.escape(path)!r},)).")
    for stacked in calibration.alike:
        if len(grids := {specs[path] for path in stacked}) > 1:
            raise ValueError(f"{', '.join(stacked)} are slices of one parameter and need one grid, not {len(grids)}.")
    if all(spec is None for spec in specs.values()):
        raise ValueError(f"skip={list(rules.skip)} leaves no layer to quantize.")
    return specs


def is_quantized(model: BlockModel) -> bool:
    """Whether any kernel is packed, as it is stored or prepared to run."""
    return any(map(is_packed, jax.tree.leaves(model.params, is_leaf=is_packed)))


def check_weights(model: BlockModel) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        if not bool(_all_finite(leaf)):
            name = re.sub(r"\W+", ".", jax.tree_util.keystr(path)).strip(".")
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its dtype too narrow.")


@jax.jit
def _all_finite(leaf: Any) -> Any:
    return jnp.all(jnp.isfinite(leaf))
