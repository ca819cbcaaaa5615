"""Quantize a model block by block: in memory, or from a source that is larger than memory into a store."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from gptq_jax.block import BlockTask, quantize_block, replay_block
from gptq_jax.calibration import Batch
from gptq_jax.clock import Clock
from gptq_jax.hooks.nnx import Params
from gptq_jax.matmul import is_packed
from gptq_jax.methods.base import Method
from gptq_jax.methods.contract import check_contract, check_method
from gptq_jax.methods.gptq import gptq
from gptq_jax.models.identity import digest_arrays
from gptq_jax.models.quantizable import Block, BlockModel, BlockSource, Calibration
from gptq_jax.parallel import DataParallel, choose_devices, make_mesh
from gptq_jax.report import LayerReport, Report, peak_memory
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.stream import KEPT_BYTES, STREAMED_BYTES, Stream, fork, open_stream
from gptq_jax.tensor import all_finite

Quantizable = TypeVar("Quantizable", bound=BlockModel)
QUANTIZED = "the model is quantized already: load the float one it was made from."
OnLayer = Callable[[LayerReport, int, int], None]  # the layer's report, layers done, layers in all


@runtime_checkable
class BlockSink(Protocol):
    """Where quantized blocks go."""

    def open(self, run: Mapping[str, Any]) -> int:
        """Begin a run, or go on with it: how many blocks are there already.

        Args:
            run: plain data that describes it: another run is one whose description differs.

        Raises:
            ValueError: what is there is of another run; the message names each difference.
        """

    def read(self, index: int) -> tuple[Params, list[LayerReport]]:
        """A block that is there."""

    def write(self, index: int, params: Params, layers: list[LayerReport]) -> None:
        """Take one more block, for good: it is there even if the process is killed now."""

    def finish(self, report: Report) -> Any:
        """All blocks are there."""


class MemorySink:
    """Makes a model of the blocks."""

    def __init__(self, assemble: Callable[[Sequence[Params], dict[str, Any]], Any]) -> None:
        self._assemble = assemble
        self._blocks: list[Params] = []

    def open(self, run: Mapping[str, Any]) -> int:
        """Nothing is there when a run begins."""
        return 0

    def read(self, index: int) -> tuple[Params, list[LayerReport]]:
        """A block, without the reports."""
        return self._blocks[index], []

    def write(self, index: int, params: Params, layers: list[LayerReport]) -> None:
        """Keep it."""
        self._blocks.append(params)

    def finish(self, report: Report) -> Any:
        """The model."""
        return self._assemble(self._blocks, report.to_json())


def quantize(
    model: Quantizable,
    batches: Sequence[Any],
    spec: QuantSpec | SpecRules | None = None,
    method: Method | None = None,
    *,
    true_sequential: bool = True,
    min_expert_tokens: int | None = None,
    devices: int | Sequence[jax.Device] | None = 1,
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
        devices: that share the work, as for `quantize_blocks`; 1: it is done where the model is.
        on_layer: called after each layer.

    Returns:
        The model with packed weights, and the report.

    Raises:
        ValueError: before the long work where it can be known: no batches, bad tokens, weights that are not
            finite or quantized already, rules that match nothing; during it, by name: a layer whose inputs are
            not finite, are all zero, or are not as many as the calibration tokens.
    """
    method = gptq() if method is None else method
    check_method(method)
    if method.rewrite is not None:
        model, method = rewritten(model, batches, spec, method)
    job = job_for(model, batches, spec, method, true_sequential, min_expert_tokens, devices)
    check_contract(job.method, job.grids)
    check_weights(model)
    quantized, report = _run(job, MemorySink(job.calibration.assemble), 0, budget=KEPT_BYTES, on_layer=on_layer)
    if job.method.finish is not None:
        found = job.method.finish.apply(model, quantized, report, job.batches)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Report)):
            raise ValueError(f"finish {job.method.finish.name!r}: apply must return the model and its Report.")
        return found
    return quantized, report


def quantize_blocks(
    source: BlockSource,
    sink: BlockSink,
    batches: Sequence[Any],
    spec: QuantSpec | SpecRules | None = None,
    method: Method | None = None,
    *,
    true_sequential: bool = True,
    min_expert_tokens: int | None = None,
    devices: int | Sequence[jax.Device] | None = None,
    activations: str | PathLike[str] | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[Any, Report]:
    """Quantize a model that need not fit into memory: blocks come from `source` one by one and go to `sink`.

    In memory are one block, its Hessians, one batch, and the calibration on its way through the model (samples x
    length x d_model numbers); nothing that grows with depth. A run that was stopped, and is started again as it was,
    goes on after the last whole block, and ends with the same bits.

    Args:
        source: a checkpoint (`open_checkpoint`), or a model.
        sink: a `StoreSink`, which writes to a directory.
        batches, spec, method, true_sequential, min_expert_tokens: as for `quantize`.
        devices: how many share the work, or which; None: all. Each takes a batch at a time, then some of the outputs
            of each layer.
        activations: a directory for a file of the calibration on its way, which is in memory otherwise.
        on_layer: called after each layer; of blocks that are there already too.

    Returns:
        What `sink.finish` returns, and the report.

    Raises:
        ValueError: as for `quantize`; or what is in the sink is of another run.
    """
    method = gptq() if method is None else method
    check_method(method)
    if method.rewrite is not None:
        raise ValueError(
            f"method {method.name!r} has the rewrite {method.rewrite.name!r}, which needs the whole model in memory: "
            "load it, and quantize what `rewritten` returns."
        )
    if method.finish is not None:
        raise ValueError(
            f"method {method.name!r} has the finish {method.finish.name!r}, which needs the whole model in memory: "
            "leave it out, and call it on what was stored (gptq-jax distill, gptq-jax correct)."
        )
    job = job_for(source, batches, spec, method, true_sequential, min_expert_tokens, devices)
    check_contract(job.method, job.grids)
    there = sink.open(job.description(source.identity()))
    return _run(job, sink, there, budget=STREAMED_BYTES, activations=activations, on_layer=on_layer)


def rewritten(
    model: Quantizable, batches: Sequence[Any], spec: QuantSpec | SpecRules | None, method: Method
) -> tuple[Quantizable, Method]:
    """The float model as the method's rewrite leaves it, and the method for it, which knows what was done.

    Args:
        model, batches, spec: as for `quantize`.
        method: with a rewrite.
    """
    assert method.rewrite is not None
    job = job_for(model, batches, spec, method, True, None, 1)  # what is wrong with them is said before the work
    check_contract(job.method, job.grids)
    check_weights(model)
    model = method.rewrite.apply(model, job.batches, job.rules)
    settings = (*method.settings, ("rewrite", method.rewrite.name), *method.rewrite.settings)
    return model, method._replace(rewrite=None, settings=settings)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, checked as far as that can be before the long work."""

    calibration: Calibration
    batches: Sequence[Batch]
    rules: SpecRules
    specs: Mapping[str, QuantSpec | None]
    method: Method
    true_sequential: bool
    min_expert_tokens: int | None
    parallel: DataParallel

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {
            "method": self.method.name,
            **self.method.all_settings,
            "true_sequential": self.true_sequential,
            **({} if self.min_expert_tokens is None else {"min_expert_tokens": self.min_expert_tokens}),
        }

    @property
    def grids(self) -> set[QuantSpec]:
        """All that are asked for."""
        return {spec for spec in self.specs.values() if spec is not None}

    @property
    def layers(self) -> int:
        """How many are quantized."""
        return sum(spec is not None for spec in self.specs.values())

    def task(self, block: Block, streams: Sequence[Stream], clock: Clock) -> BlockTask:
        """For one block."""
        return BlockTask(
            block=block,
            specs={path: self.specs[block.prefix + path] for group in block.groups for path in group},
            method=self.method,
            streams=streams,
            true_sequential=self.true_sequential,
            min_expert_tokens=self.min_expert_tokens,
            clock=clock,
        )

    def open_streams(self, budget: int, directory: str | PathLike[str] | None = None) -> list[Stream]:
        """The calibration before the first block, once for each way through it; `budget` bytes are shared by all."""
        count = 2 if self.method.needs_float_inputs or self.method.tuning is not None else 1
        shapes = [str(jax.tree.map(np.shape, batch.tokens)) for batch in self.batches]
        first = open_stream(self.calibration, shapes, self.parallel, budget=budget // count, directory=directory)
        return [first, *(fork(first, directory) for _ in range(count - 1))]

    def description(self, model: Mapping[str, str]) -> dict[str, Any]:
        """Everything that the result depends on, as plain data."""
        from gptq_jax import __version__

        return {
            "model": dict(model),
            "calibration": digest_arrays([(batch.tokens, batch.mask) for batch in self.batches]),
            "grids": asdict(self.rules),
            "settings": self.settings,
            "versions": {"gptq-jax": __version__, "jax": jax.__version__},
            "devices": {"kind": jax.devices()[0].device_kind, "count": self.parallel.size},
        }


def job_for(
    source: BlockSource,
    batches: Sequence[Any],
    spec: QuantSpec | SpecRules | None,
    method: Method | None,
    true_sequential: bool,
    min_expert_tokens: int | None,
    devices: int | Sequence[jax.Device] | None,
) -> Job:
    """Check what is asked for; arguments and errors as for `quantize_blocks`."""
    rules = spec if isinstance(spec, SpecRules) else SpecRules(default=spec or QuantSpec())
    rules = replace(rules, default=replace(rules.default, scale_dtype=rules.default.scale_dtype or "float16"))
    if min_expert_tokens is not None and min_expert_tokens < 0:
        raise ValueError(f"min_expert_tokens={min_expert_tokens} must not be negative; 0 for each expert by itself.")
    if not batches:
        raise ValueError("batches is empty: pass at least one array of calibration tokens [batch, time].")
    method = gptq() if method is None else method
    check_contract(method, ())
    if method.tuning is not None and jax.process_count() > 1:
        raise ValueError(
            f"method {method.name!r} has the tuning {method.tuning.name!r}, which one process does: run it in one, or "
            "leave the tuning out."
        )
    if isinstance(source, BlockModel) and is_quantized(source):
        raise ValueError(QUANTIZED)
    pairs = [batch if isinstance(batch, Batch) else Batch(batch) for batch in batches]
    calibration = source.calibration([batch.tokens for batch in pairs], [batch.mask for batch in pairs])
    return Job(
        calibration=calibration,
        batches=pairs,
        rules=rules,
        specs=block_specs(calibration, rules),
        method=method,
        true_sequential=true_sequential,
        min_expert_tokens=min_expert_tokens,
        parallel=_devices(devices, calibration),
    )


def _run(
    job: Job,
    sink: BlockSink,
    there: int,
    *,
    budget: int,
    activations: str | PathLike[str] | None = None,
    on_layer: OnLayer | None,
) -> tuple[Any, Report]:
    """All blocks, of which the first so many are there."""
    layers: list[LayerReport] = []

    def done(layer: LayerReport) -> None:
        layers.append(layer)
        if on_layer is not None:
            on_layer(layer, len(layers), job.layers)

    clock, blocks = Clock(), job.calibration.blocks
    streams: list[Stream] = []
    if there < len(blocks):
        with clock("forward"):
            streams = job.open_streams(budget, activations)
    for index, block in enumerate(blocks):
        if index < there:
            packed, reports = sink.read(index)
            for layer in reports:
                done(layer)
            if streams:
                replay_block(job.task(block, streams, clock), packed)
            continue
        first = len(layers)
        packed = quantize_block(job.task(block, streams, clock), done)
        with clock("write"):
            sink.write(index, packed, layers[first:])
    skipped = {path: "skipped by a rule" for path, spec in job.specs.items() if spec is None}
    report = Report(
        layers=tuple(layers),
        kept_float={**skipped, **job.calibration.kept_float},
        seconds=dict(clock.seconds),
        settings=job.settings,
        peak_bytes=peak_memory(),
    )
    return sink.finish(report), report


def _devices(devices: int | Sequence[jax.Device] | None, calibration: Calibration) -> DataParallel:
    """Where the work is done; one device is no mesh, and arrays stay where they are."""
    if calibration.one_device is not None and devices is None:
        return DataParallel(None)
    chosen = choose_devices(devices)
    if len(chosen) > 1 and calibration.one_device is not None:
        raise ValueError(f"devices={devices}: {calibration.one_device} device; pass devices=1.")
    return DataParallel(make_mesh(chosen) if len(chosen) > 1 else None)


def layer_specs(model: BlockModel, rules: SpecRules) -> dict[str, QuantSpec | None]:
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
        if not bool(all_finite(leaf)):
            name = re.sub(r"\W+", ".", jax.tree_util.keystr(path)).strip(".")
            raise ValueError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its dtype too narrow.")
