"""Quantize one block: watch what its linear layers are fed, solve them, put the answers in their place."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gptq_jax.hessian import output_energy
from gptq_jax.hooks.experts import Routed
from gptq_jax.hooks.nnx import Input, Params, kernel_of, with_kernel
from gptq_jax.methods.base import LayerBatch, Method, Solution, with_hessian
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.quantizable import Block
from gptq_jax.report import ExpertsReport, LayerReport
from gptq_jax.spec import QuantSpec
from gptq_jax.statistics import (
    ROWS_PER_INPUT,
    ExpertStats,
    init_experts,
    over_experts,
    solve_experts,
    update_experts,
)
from gptq_jax.tensor import QuantizedTensor, split_outputs, validate

Inputs = dict[str, Input]  # of linear layers by path

KEPT_BYTES = 2 * 2**30  # of inputs kept while a block is solved; beyond it they are computed again


class Observed(NamedTuple):
    """What calibration says of the input that some layers share.

    Attributes:
        stats: the method's, with the Hessian; `ExpertStats` for stacked experts.
        hessian: of the input, or of the rows of each expert.
        tokens: of the calibration.
    """

    stats: Any
    hessian: Float[Array, "*experts d_in d_in"]
    tokens: int


class Clock:
    """Wall seconds by stage. `with clock("solve") as ready: ready(array)` waits for what the stage computes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[Any], Any]]:
        """Add the time of the `with` block to `stage`."""
        start = time.perf_counter()
        yield jax.block_until_ready
        self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block of a model, and what is to be done with it.

    Attributes:
        block: which.
        specs: the grid of each linear layer by path inside the block; None stays float.
        method: the quantization method.
        masks: of the calibration batches: True for real tokens; None if all are.
        min_expert_tokens: as for `quantize`.
        clock: where seconds are counted.
    """

    block: Block
    specs: dict[str, QuantSpec | None]
    method: Method
    masks: Sequence[Bool[Array, "batch time"] | None]
    min_expert_tokens: int | None = None
    clock: Clock = field(default_factory=Clock)

    def needed(self, d_in: int) -> int:
        """Tokens that an expert must have seen for its own statistics to be used."""
        return max(ROWS_PER_INPUT * d_in if self.min_expert_tokens is None else self.min_expert_tokens, 1)

    def run(self, params: Params, stream: list[Any], known: list[Inputs]) -> list[Any]:
        """The state after the block, batch by batch."""
        with self.clock("forward") as ready:
            return ready(
                [
                    self.block.run(params, x, mask, inputs)
                    for x, mask, inputs in zip(stream, self.masks, known, strict=True)
                ]
            )


def quantize_block(
    task: BlockTask,
    params: Params,
    stream: list[Any],
    *,
    true_sequential: bool,
    done: Callable[[LayerReport], None],
) -> tuple[Params, list[Any]]:
    """Quantize the linear layers of one block.

    Args:
        task: what to do.
        params: the float parameters.
        stream: the state before the block, for each batch.
        true_sequential: layers see their quantized predecessors inside the block.
        done: called with the report of each layer.

    Returns:
        The parameters with packed kernels, and the state after the block that holds them.
    """
    groups = [
        targeted
        for group in task.block.groups
        if (targeted := tuple(path for path in group if task.specs[path] is not None))
    ]
    packed = working = params
    # Inputs seen once are not computed again, so a block costs one forward pass, not one for each stage.
    known: list[Inputs] = [{} for _ in stream]
    for stage in [[group] for group in groups] if true_sequential else [groups]:
        observed = _observe(task, working, stream, known if true_sequential else [{} for _ in stream], stage)
        for group, said in zip(stage, observed, strict=True):
            for path, tensor, report in _solve(task, params, group, said):
                packed = with_kernel(packed, path, tensor)
                working = with_kernel(working, path, tensor.dequantize(kernel_of(params, path).dtype))
                done(report)
    return packed, task.run(working, stream, known)


def _observe(
    task: BlockTask, params: Params, stream: list[Any], known: list[Inputs], groups: list[tuple[str, ...]]
) -> list[Observed]:
    """What each group's shared input says.

    Inputs are added to `known`, as far as `KEPT_BYTES` go.
    """
    method = with_hessian(task.method)
    wanted = tuple(group[0] for group in groups)
    stats: dict[str, Any] = {}
    tokens, expected = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    for path, group in zip(wanted, groups, strict=True):
        *stack, d_in, _ = kernel_of(params, path).shape
        d_out = sum(kernel_of(params, member).shape[-1] for member in group)
        stats[path] = init_experts(method, stack[0], d_in, d_out) if stack else method.init(d_in, d_out)
    kept = _nbytes(known)
    for x, mask, inputs in zip(stream, task.masks, known, strict=True):
        with task.clock("forward") as ready:
            captured = ready(task.block.capture(params, x, wanted, mask, inputs))
        for path, group in zip(wanted, groups, strict=True):
            # Each input of the batch, padding included, comes by once; a layer that sees others says so here.
            seen, places = _tokens(captured[path]), task.block.rows(x, path)
            real = places if mask is None else int(mask.sum())
            expected[path] += real
            tokens[path] += real if seen == places else seen
            with task.clock("hessian") as ready:
                stats[path] = ready(_update(method, stats[path], captured[path], mask))
            kept += _nbytes([{path: captured[path]}])
            if kept <= KEPT_BYTES:
                inputs.update(dict.fromkeys(group, captured[path]))
    found = []
    for path, group in zip(wanted, groups, strict=True):
        own = stats[path].own if isinstance(stats[path], ExpertStats) else stats[path]
        assert method.hessian is not None  # with_hessian saw to it
        names = ", ".join(task.block.prefix + member for member in group)
        _check(names, method.hessian(own), tokens[path], expected[path])
        found.append(Observed(stats[path], method.hessian(own), expected[path]))
    return found


def _tokens(captured: Input) -> int:
    """Tokens that a layer saw, padding included."""
    if isinstance(captured, Routed):
        return captured.weights.shape[0]
    return captured.size // captured.shape[-1]


def _update(method: Method, stats: Any, captured: Input, mask: Bool[Array, "batch time"] | None) -> Any:
    """The statistics with one more batch."""
    if isinstance(captured, Routed):
        real = jnp.ones(_tokens(captured), bool) if mask is None else mask.reshape(-1)
        return update_experts(stats, captured, real, update=method.update)
    rows = captured.reshape(-1, captured.shape[-1])
    if mask is not None:
        rows = jnp.where(mask.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
    return _jit(method.update, donate=0)(stats, LayerBatch(rows))


def _nbytes(known: list[Inputs]) -> int:
    arrays = {id(array): array.nbytes for array in jax.tree.leaves(known)}
    return sum(arrays.values())


def _check(names: str, hessian: Array, tokens: int, expected: int) -> None:
    """Stop the run, naming the layers, where the Hessian cannot be what calibration should have made it."""
    if tokens != expected:
        raise ValueError(f"{names} saw {tokens} tokens, but the calibration has {expected}.")
    if not bool(jnp.all(jnp.isfinite(hessian))):
        raise ValueError(
            f"the inputs of {names} hold NaN or infinity: check the model's weights, or load it in float32."
        )
    if not bool(jnp.any(hessian)):
        raise ValueError(f"the inputs of {names} are all zero: the calibration says nothing about this layer.")


def _solve(
    task: BlockTask, params: Params, group: tuple[str, ...], observed: Observed
) -> Iterator[tuple[str, QuantizedTensor, LayerReport]]:
    """The packed kernels of layers with one input, solved as one wherever their grids are the same."""
    same_spec: dict[QuantSpec, list[str]] = defaultdict(list)
    for path in group:
        spec = task.specs[path]
        assert spec is not None  # only targeted layers come here
        same_spec[spec].append(path)
    for spec, paths in same_spec.items():
        kernels = [kernel_of(params, path) for path in paths]
        weight = jnp.concatenate([kernel.astype(jnp.float32) for kernel in kernels], axis=-1)
        start = time.perf_counter()
        with task.clock("solve") as ready:
            solution = ready(_solution(task, weight, observed.stats, spec))
        seconds = time.perf_counter() - start
        tensor, notes = solution if isinstance(solution, Solution) else (solution, {})
        _check_solution(tensor, weight.shape, spec, f"method {task.method.name!r}, for {', '.join(paths)}")
        with task.clock("measure") as ready:
            losses, rounded, energy = ready(_losses(weight, tensor, observed.hessian, spec))
        failed = np.asarray(notes.get("fell_back", False))
        sizes = [kernel.shape[-1] for kernel in kernels]
        at = 0
        for path, size, part in zip(paths, sizes, split_outputs(tensor, sizes), strict=True):
            here = slice(at, at + size)
            at += size
            loss = max(float(losses[here].sum()), 0.0)  # rounding can take a tiny one below zero
            yield (
                path,
                part,
                LayerReport(
                    path=task.block.prefix + path,
                    method="rtn" if failed.all() else task.method.name,
                    spec=spec,
                    d_in=weight.shape[-2],
                    d_out=size,
                    loss=loss / observed.tokens,
                    rtn_loss=max(float(rounded[here].sum()), 0.0) / observed.tokens,
                    relative_error=(loss / max(float(energy[here].sum()), 1e-30)) ** 0.5,
                    damping=float(f"{float(notes['damping'].max()):.6g}") if "damping" in notes else None,
                    fell_back=bool(failed.any()),
                    tokens=observed.tokens,
                    seconds=seconds / len(paths),
                    nbytes=part.nbytes,
                    experts=_experts_report(task, observed.stats, weight.shape[-2], failed),
                ),
            )


def _solution(task: BlockTask, weight: Array, stats: Any, spec: QuantSpec) -> Any:
    """What the method's `solve` returns, which `_check_solution` holds to its contract."""
    solve = with_hessian(task.method).solve
    if not isinstance(stats, ExpertStats):
        return _jit(solve, static=2)(weight, stats, spec)
    return solve_experts(weight, stats, stats.rows < task.needed(weight.shape[1]), solve=solve, spec=spec)


def _experts_report(task: BlockTask, stats: Any, d_in: int, failed: np.ndarray) -> ExpertsReport | None:
    if not isinstance(stats, ExpertStats):
        return None
    rows, needed = np.asarray(stats.rows), task.needed(d_in)
    experts = [tuple(np.flatnonzero(these).tolist()) for these in (rows < needed, rows == 0, failed)]
    return ExpertsReport(
        count=rows.size,
        needed=needed,
        least=int(rows.min()),
        most=int(rows.max()),
        shared=experts[0],
        unseen=experts[1],
        rounded=experts[2],
    )


def _check_solution(tensor: Any, shape: tuple[int, ...], spec: QuantSpec, whose: str) -> None:
    """Hold a method to its contract."""
    if not isinstance(tensor, QuantizedTensor):
        raise ValueError(f"{whose}: solve returned {type(tensor).__name__}, but must return a QuantizedTensor.")
    if tensor.shape != shape or tensor.spec != spec:
        raise ValueError(
            f"{whose}: solve returned a tensor of shape {tensor.shape} and {tensor.spec}, "
            f"but must keep {shape} and {spec}."
        )
    validate(tensor, whose)


@partial(jax.jit, static_argnames="spec")
def _losses(
    weight: Float[Array, "*experts d_in d_out"],
    tensor: QuantizedTensor,
    hessian: Float[Array, "*experts d_in d_in"],
    spec: QuantSpec,
) -> tuple[Float[Array, "d_out"], Float[Array, "d_out"], Float[Array, "d_out"]]:
    """By output: the squared error of the tensor, of rounding to nearest, and the squared output itself.

    Those of experts are summed, each measured on the tokens routed to it.
    """
    if weight.ndim == 3:
        measured = over_experts(partial(_losses, spec=spec), weight, tensor, hessian)
        return jax.tree.map(partial(jnp.sum, axis=0), measured)
    rounded = round_to_nearest(weight, spec)
    return (
        output_energy(weight - tensor.dequantize(), hessian),
        output_energy(weight - rounded.dequantize(), hessian),
        output_energy(weight, hessian),
    )


@lru_cache(maxsize=64)
def _jit(function: Callable[..., Any], static: int | None = None, donate: int | None = None) -> Callable[..., Any]:
    """The jitted function, the same one for every block."""
    return jax.jit(
        function,
        static_argnums=() if static is None else static,
        donate_argnums=() if donate is None else donate,
    )
