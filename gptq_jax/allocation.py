"""Bits where they serve best: a grid for each layer, so that all together stay within a budget of bits per weight.

One pass of the float model gathers the Hessian of each input, and each layer is solved on each candidate grid. What is
minimized is the sum over layers of the divergence that the error of each is expected to bring (`sensitivity`), exactly,
by dynamic programming over bytes: the linear model of HIGGS (Malinovskii et al. 2025, arXiv 2411.17525), in which
errors of layers add up to that of the model, with coefficients from slopes in the place of fitted ones.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from gptq_jax.block import BlockTask, run_again, solve_group
from gptq_jax.clock import Clock
from gptq_jax.hooks.nnx import Params, kernel_of
from gptq_jax.methods.base import Method
from gptq_jax.methods.contract import check_contract
from gptq_jax.models.quantizable import BlockSource
from gptq_jax.observe import Way, observe
from gptq_jax.parallel.hosts import on_first
from gptq_jax.pipeline import Job, job_for
from gptq_jax.planning.sizes import packed_shape
from gptq_jax.report import LayerReport
from gptq_jax.sensitivity import expected_divergence, fisher_traces
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.progress import Progress
from gptq_jax.stream import STREAMED_BYTES

BITS = (2, 3, 4, 8)
_MOST_UNITS = 2**16  # of the budget: where sizes divide it into more, they are rounded up

Candidates = Mapping[str, Mapping[int, QuantSpec]]  # of each layer by path: its grid with so many bits


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a layer, or several that must have one grid, would be with so many bits.

    Attributes:
        bits: of the grid.
        nbytes: packed, with scales and zeros.
        error: the divergence from the float model that it is expected to bring, in nats per token, or where that is
            not known |X(W-Q)|^2 / |XW|^2; summed over the layers.
    """

    bits: int
    nbytes: int
    error: float


class _Measured(NamedTuple):
    """What is known of the layers, in the order of the candidates; as arrays, for `Progress`.

    Attributes:
        traces: of the Fisher information; 1 where the model's head is not known.
        errors, nbytes: as in `Choice`, by layer and by its candidates with the fewest bits first.
    """

    traces: Float64[np.ndarray, "layers"]
    errors: Float64[np.ndarray, "layers candidates"]
    nbytes: Int64[np.ndarray, "layers candidates"]


def allocate_bits(
    source: BlockSource,
    batches: Sequence[Any],
    target_bpw: float,
    *,
    bits: Sequence[int] = BITS,
    spec: QuantSpec | SpecRules | None = None,
    method: Method | None = None,
    min_expert_tokens: int | None = None,
    devices: int | Sequence[jax.Device] | None = 1,
    activations: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SpecRules:
    """Choose the bits of each layer, for `quantize(model, batches, allocate_bits(model, batches, 3.5))`.

    Assumes that what errors of layers do to the predictions adds up. Of a module of one's own, whose predictions are
    not known, relative errors of layers add up in their place, each counting alike wherever it is. Layers are measured
    on the inputs that the float model gives them. Memory is that of `quantize_blocks`, and the stream before every
    block for 8 windows; time is that of quantizing the model, but for the solver, which runs once for each candidate,
    and of a pass back through it for those windows.

    Args:
        source: a float model, or a checkpoint (`open_checkpoint`).
        batches: as for `quantize`.
        target_bpw: bits per weight of all quantized layers together, scales and zeros counted, as reports give them.
        bits: the candidates.
        spec: everything else about the grids, and what is skipped. An override that says `bits` settles them for its
            layers, which count.
        method: that is measured, best the one that will quantize; `gptq()` if None.
        min_expert_tokens, devices, activations: as for `quantize_blocks`.
        progress: where measured blocks are kept, so that the same call goes on after a crash, for whatever budget. For
            one process.
        on_step: called with how many steps are done, and how many there are: each block on the way through the model
            and back, then each candidate.

    Returns:
        Rules that take no more than the budget, with the least error there is within it.

    Raises:
        ValueError: before the long work: no candidates, or a budget that is less than the least of them take, and what
            `quantize` says of its arguments; during it: a layer without a finite error.
    """
    if not bits:
        raise ValueError(f"bits={bits!r} is empty: give candidates, e.g. {BITS}.")
    if not 0 < target_bpw < math.inf:
        raise ValueError(f"target_bpw={target_bpw} must be a positive number of bits per weight.")
    # Tuning comes after solving, and is of whole blocks.
    solving = None if method is None else method._replace(tuning=None)
    job = job_for(source, batches, spec, solving, True, min_expert_tokens, devices)
    candidates = _candidates(job, sorted(set(bits)))
    budget = _checked_budget(job, candidates, target_bpw)
    check_contract(job.method, (grid for each in candidates.values() for grid in each.values()))

    measured = _measure(job, candidates, activations, progress, on_step)
    stacks = [paths for paths in map(tuple, job.calibration.alike) if paths[0] in measured]
    alone = set(measured).difference(*stacks)
    units = [*stacks, *((path,) for path in measured if path in alone)]
    choices = [_together([measured[path] for path in paths]) for paths in units]
    chosen = choose(choices, budget)
    return _rules(job.rules, {path: choice.bits for paths, choice in zip(units, chosen, strict=True) for path in paths})


def choose(choices: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice of each: those with the least sum of errors whose bytes are no more than `budget` together.

    Dynamic programming over what is spent beyond the smallest choices, in units of the greatest common divisor of the
    steps between sizes; exact as long as these are at most 2^16, else each size is rounded up to a unit.

    Raises:
        ValueError: the smallest choices take more than `budget`.
    """
    least = [min(choice.nbytes for choice in each) for each in choices]
    if budget < sum(least):
        raise ValueError(f"budget={budget} bytes are fewer than the {sum(least)} that the smallest choices take.")
    steps = [[choice.nbytes - start for choice in each] for each, start in zip(choices, least, strict=True)]
    spare = min(budget - sum(least), sum(map(max, steps)))
    unit = max(math.gcd(*(step for each in steps for step in each)), -(-spare // _MOST_UNITS), 1)
    capacity = spare // unit
    costs = [[-(-step // unit) for step in each] for each in steps]

    errors = np.zeros(capacity + 1)  # the least of the layers so far, by what they may spend
    picks = []
    for each, cost in zip(choices, costs, strict=True):
        rows = np.full((len(each), capacity + 1), np.inf)
        for row, choice, spent in zip(rows, each, cost, strict=True):
            if spent <= capacity:
                row[spent:] = errors[: capacity + 1 - spent] + choice.error
        picks.append(np.argmin(rows, axis=0).astype(np.int8))
        errors = rows.min(axis=0)

    chosen, left = [], capacity
    for each, cost, pick in zip(reversed(choices), reversed(costs), reversed(picks), strict=True):
        chosen.append(each[pick[left]])
        left -= cost[pick[left]]
    return chosen[::-1]


def _candidates(job: Job, bits: Sequence[int]) -> Candidates:
    """The grids of each layer that is quantized."""
    found = {}
    for path, spec in job.specs.items():
        if spec is not None:
            own = [spec.bits] if "bits" in job.rules.override_for(path) else bits
            found[path] = {each: replace(spec, bits=each) for each in own}
    return found


def _checked_budget(job: Job, candidates: Candidates, target_bpw: float) -> int:
    """Bytes; ValueError where they are fewer than the least candidates take, known from shapes alone."""
    weights = least = 0
    for block in job.calibration.blocks:
        params = block.params
        for path in (path for group in block.groups for path in group):
            if grids := candidates.get(block.prefix + path):
                shape = kernel_of(params, path).shape
                weights += math.prod(shape)
                least += min(packed_shape(shape, grid).nbytes for grid in grids.values())
    # What a report gives as bits per weight is not to be lost to its rounding.
    budget = math.floor(target_bpw * weights / 8 * (1 + 1e-12))
    if budget < least:
        raise ValueError(
            f"target_bpw={target_bpw} is less than the {8 * least / weights:.4g} bits per weight that the smallest "
            "grids take, scales and zeros counted: allow more, larger groups or fewer bits."
        )
    return budget


def _measure(
    job: Job,
    candidates: Candidates,
    directory: str | PathLike[str] | None,
    progress: Progress | None,
    on_step: Callable[[int, int], None] | None,
) -> dict[str, dict[int, Choice]]:
    """What each layer would be on each of its grids, on what the float model feeds it."""
    blocks, clock = job.calibration.blocks, Clock()
    rows = {path: row for row, path in enumerate(candidates)}
    shape = len(rows), max(map(len, candidates.values()))
    found, there = _Measured(np.ones(shape[0]), np.zeros(shape), np.zeros(shape, np.int64)), 0
    if progress is not None:
        found, there = progress.open(found)
    known = job.calibration.head is not None
    there_and_back = 2 * len(blocks) if known else 0
    done, total = 0, there_and_back + sum(map(len, candidates.values()))

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step(done, total)

    if there:
        step(there_and_back)
    elif known:
        traces = on_first(lambda: fisher_traces(job.calibration, candidates, directory=directory, on_block=step))
        found.traces[:] = [traces[path] for path in rows]
    if there == len(blocks):  # the model is not needed again
        blocks = ()
    streams = job.open_streams(STREAMED_BYTES, directory) if blocks else []
    for index, block in enumerate(blocks):
        task = job.task(block, streams, clock)
        params = task.read()
        ways = task.ways(params, params)
        if index < there:
            step(sum(len(candidates[block.prefix + path]) for path in task.paths()))
            run_again(task, ways)
            continue
        for layer, energy in _solved(job, task, params, ways, candidates):
            row, column = rows[layer.path], sorted(candidates[layer.path]).index(layer.spec.bits)
            error = layer.relative_error**2
            if known:
                error = expected_divergence(found.traces[row], layer.loss, energy, layer.d_out)
            if not math.isfinite(error):
                raise ValueError(
                    f"{layer.path} has no finite error at {layer.spec.bits} bits: check the model's weights."
                )
            found.errors[row, column], found.nbytes[row, column] = error, layer.nbytes
            step()
        task.leave(ways)
        if progress is not None:
            progress.keep(found, index + 1, now=index + 1 == len(blocks))
    return {
        path: {
            bits: Choice(bits=bits, nbytes=int(nbytes), error=float(error))
            for bits, nbytes, error in zip(sorted(grids), *of_layer, strict=False)
        }
        for (path, grids), *of_layer in zip(candidates.items(), found.nbytes, found.errors, strict=True)
    }


def _solved(
    job: Job, task: BlockTask, params: Params, ways: Sequence[Way], candidates: Candidates
) -> Iterator[tuple[LayerReport, float]]:
    """The layers of a block on each of their grids: reports, and |x|^2 per token."""
    for stage in task.stages():
        observed = observe(task.block, job.method, ways, stage, keep=True, clock=task.clock)
        for group, said in zip(stage, observed, strict=True):
            energy = float(jnp.trace(said.hessian, axis1=-2, axis2=-1).sum()) / said.tokens
            grids = {path: candidates[task.block.prefix + path] for path in group}
            for bits in sorted(set().union(*grids.values())):
                specs = {path: grids[path][bits] for path in group if bits in grids[path]}
                for _, _, report in solve_group(replace(task, specs=specs), params, tuple(specs), said):
                    yield report, energy


def _together(layers: Sequence[Mapping[int, Choice]]) -> list[Choice]:
    """Of layers that must have one grid."""
    return [
        Choice(
            bits=bits,
            nbytes=sum(each[bits].nbytes for each in layers),
            error=sum(each[bits].error for each in layers),
        )
        for bits in layers[0]
    ]


def _rules(rules: SpecRules, bits: Mapping[str, int]) -> SpecRules:
    """`rules` with these bits: the commonest by default, the rest by an override for each kind of grid."""
    (commonest, _), *_ = Counter(bits.values()).most_common()
    alike = defaultdict(list)
    for path, chosen in bits.items():
        fields = rules.override_for(path)
        if fields.get("bits", commonest) != chosen:
            alike[tuple({**fields, "bits": chosen}.items())].append(path)
    named = tuple((f"^({'|'.join(map(re.escape, paths))})$", fields) for fields, paths in alike.items())
    return replace(rules, default=replace(rules.default, bits=commonest), overrides=(*named, *rules.overrides))
