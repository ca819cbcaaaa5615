"""Quantize one block: watch what its linear layers are fed, solve them, put the answers in their place."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_jax.clock import Clock
from gptq_jax.hessian import output_energy
from gptq_jax.hooks.nnx import Params, kernel_of, with_kernel
from gptq_jax.methods.base import Method, Tuning, with_hessian
from gptq_jax.methods.contract import check_solution
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.quantizable import Block
from gptq_jax.observe import Group, Observed, Way, look_again, observe
from gptq_jax.parallel import DataParallel
from gptq_jax.parallel.by_outputs import Outputs, by_outputs
from gptq_jax.report import ExpertsReport, LayerReport, TuningReport
from gptq_jax.spec import QuantSpec
from gptq_jax.statistics import ROWS_PER_INPUT, ExpertStats, over_experts, solve_experts
from gptq_jax.stream import Examples, Stream
from gptq_jax.tensor import QuantizedTensor, split_outputs, take_outputs, validate
from gptq_jax.tuning.fit import tune

MEASURED_OUTPUTS = 512  # of a layer, whose losses are found at a time


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block of a model, and what is to be done with it.

    Attributes:
        block: which.
        specs: the grid of each linear layer by path inside the block; None stays float.
        method: the quantization method.
        streams: that of the model as it is quantized so far, and that of the float model if the method or its tuning
            asks for it.
        true_sequential: layers see their quantized predecessors inside the block.
        min_expert_tokens: as for `quantize`.
        clock: where seconds are counted.
    """

    block: Block
    specs: Mapping[str, QuantSpec | None]
    method: Method
    streams: Sequence[Stream]
    true_sequential: bool = True
    min_expert_tokens: int | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def parallel(self) -> DataParallel:
        """The devices."""
        return self.streams[0].parallel

    def needed(self, d_in: int) -> int:
        """Tokens that an expert must have seen for its own statistics to be used."""
        return max(ROWS_PER_INPUT * d_in if self.min_expert_tokens is None else self.min_expert_tokens, 1)

    def stages(self) -> list[list[Group]]:
        """The layers that are quantized, by input, in turns: a turn's inputs depend on those before it."""
        groups = [
            targeted
            for group in self.block.groups
            if (targeted := tuple(path for path in group if self.specs[path] is not None))
        ]
        return [[group] for group in groups] if self.true_sequential else [groups]

    def paths(self) -> list[str]:
        """The layers that are quantized."""
        return [path for stage in self.stages() for group in stage for path in group]

    def read(self) -> Params:
        """The block's float parameters, on all devices."""
        with self.clock("read") as ready:
            return ready(self.parallel.replicate(self.block.params))

    def ways(self, working: Params, floats: Params | None) -> list[Way]:
        """The streams with the parameters that each is to see."""
        return [Way(self.streams[0], working), *(Way(stream, floats) for stream in self.streams[1:] if floats)]

    def watched(self, ways: Sequence[Way]) -> Sequence[Way]:
        """Those of `ways` on which the method looks at inputs of layers."""
        return ways if self.method.needs_float_inputs else ways[:1]

    def leave(self, ways: Sequence[Way]) -> None:
        """Go on to the states after the block."""
        with self.clock("forward"):
            for stream, params in ways:
                stream.leave(self.block.forward, params)


def quantize_block(task: BlockTask, done: Callable[[LayerReport], None]) -> Params:
    """Quantize the linear layers of one block, and take the streams through it.

    Args:
        task: what to do.
        done: called with the report of each layer.

    Returns:
        The parameters with packed kernels.
    """
    packed = task.read()
    floats = packed if len(task.streams) > 1 else None
    dtypes = {path: kernel_of(packed, path).dtype for path in task.paths()}
    solved: dict[str, LayerReport] = {}
    for stage in task.stages():
        observed = observe(
            task.block,
            task.method,
            task.watched(task.ways(_dequantized(packed, dtypes), floats)),
            stage,
            keep=task.true_sequential,
            clock=task.clock,
        )
        # Solving takes the most memory: by now no kernel is float but those to come.
        for group, said in zip(stage, observed, strict=True):
            for path, tensor, report in solve_group(task, packed, group, said):
                packed = with_kernel(packed, path, tensor)
                if task.method.tuning is None:
                    done(report)
                else:
                    solved[path] = report
    if task.method.tuning is None:
        task.leave(task.ways(_dequantized(packed, dtypes), floats))
        return packed
    assert floats is not None  # a tuning comes with a float stream
    tuned, change = _tune(task, task.method.tuning, packed, floats)
    for path, report in solved.items():
        packed = with_kernel(packed, path, tuned[path])
        done(replace(report, nbytes=tuned[path].nbytes, tuning=change))
    task.leave(task.ways(_dequantized(packed, dtypes), floats)[:1])
    return packed


def replay_block(task: BlockTask, packed: Params) -> None:
    """Take the streams through a block that was quantized before, as `quantize_block` took them: to the same bits.

    Args:
        task: as it was.
        packed: what came of it.
    """
    floats = task.read()
    dtypes = {path: kernel_of(floats, path).dtype for path in task.paths()}
    working = _dequantized(task.parallel.replicate(packed), dtypes)
    run_again(task, task.ways(working, floats if len(task.streams) > 1 else None))


def run_again(task: BlockTask, ways: Sequence[Way]) -> None:
    """Take the streams through a block whose parameters are found, by the programs that ran while they were sought."""
    # Stage by stage, for these are the programs that computed the inputs; a tuned block ran as a whole in the end.
    again = task.watched(ways)[0 if task.method.tuning is None else 1 :]
    if task.true_sequential and again:
        for stage in task.stages():
            look_again(task.block, again, stage, clock=task.clock)
    task.leave(ways)


def _tune(
    task: BlockTask, tuning: Tuning, packed: Params, floats: Params
) -> tuple[dict[str, QuantizedTensor], TuningReport]:
    """The packed kernels by path, tuned on one device; first the float stream goes through the block, as the target."""
    quantized, target = task.streams
    task.leave([Way(target, floats)])
    quantized.forget()
    weights = {path: kernel_of(floats, path) for path in task.paths()}
    examples = Examples(quantized.windows(), quantized.states, target.states)
    with task.clock("tune"):
        params, weights = task.parallel.on_one((packed, weights))
        tuned = tune(tuning, task.block.forward, params, weights, examples)
    return task.parallel.replicate(tuned.tensors), TuningReport(before=tuned.before, after=tuned.after)


def _dequantized(params: Params, dtypes: Mapping[str, Any]) -> Params:
    """With float kernels, of the dtype that is given by path, in place of packed ones."""
    for path, dtype in dtypes.items():
        kernel = kernel_of(params, path)
        if isinstance(kernel, QuantizedTensor):
            params = with_kernel(params, path, kernel.dequantize(dtype))
    return params


def solve_group(
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
        floats = [kernel.astype(jnp.float32) for kernel in kernels]
        weight = floats[0] if len(floats) == 1 else jnp.concatenate(floats, axis=-1)
        del floats
        start = time.perf_counter()
        with task.clock("solve") as ready:
            solution = ready(_solution(task, weight, observed.stats, spec))
        seconds = time.perf_counter() - start
        whose = f"method {task.method.name!r}, for {', '.join(paths)}"
        tensor, notes = check_solution(solution, weight.shape, spec, whose)
        validate(tensor, whose)
        with task.clock("measure"):
            measured = by_outputs(
                _losses, spec, mesh=task.parallel.mesh, cut=(weight, tensor), whole=(observed.hessian,)
            )
            losses, rounded, energy = map(np.asarray, measured)
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
    """What the method's `solve` returns, which `check_solution` holds to its contract."""
    solve = with_hessian(task.method).solve
    mesh = task.parallel.mesh if task.method.independent_outputs else None
    if not isinstance(stats, ExpertStats):
        return by_outputs(_solve_weight, solve, spec, mesh=mesh, cut=(weight,), whole=(stats,))
    shares = stats.rows < task.needed(weight.shape[1])
    return by_outputs(_solve_stack, solve, spec, mesh=mesh, cut=(weight,), whole=(stats, shares))


@partial(jax.jit, static_argnums=(0, 1))
def _solve_weight(solve: Any, spec: QuantSpec, weight: Float[Array, "d_in d_out"], stats: Any) -> Any:
    return solve(weight, stats, spec)


def _solve_stack(
    solve: Any, spec: QuantSpec, weights: Float[Array, "experts d_in d_out"], stats: ExpertStats, shares: Array
) -> Any:
    return solve_experts(weights, stats, shares, solve=solve, spec=spec)


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


@partial(jax.jit, static_argnums=0)
def _losses(
    spec: QuantSpec,
    weight: Float[Array, "*experts d_in d_out"],
    tensor: QuantizedTensor,
    hessian: Float[Array, "*experts d_in d_in"],
) -> Outputs:
    """By output: the squared error of the tensor, of rounding to nearest, and the squared output itself.

    Those of experts are summed, each measured on the tokens routed to it.
    """
    if weight.ndim == 3:
        measured = over_experts(partial(_losses, spec), weight, tensor, hessian)
        return jax.tree.map(partial(jnp.sum, axis=0), measured)
    d_out = weight.shape[1]
    size = min(MEASURED_OUTPUTS, d_out)

    def measure(k: Array, found: Float[Array, "3 d_out"]) -> Float[Array, "3 d_out"]:
        start = jnp.minimum(k * size, d_out - size)  # the last may begin before the one before it ends
        part = jax.lax.dynamic_slice_in_dim(weight, start, size, axis=1)
        packed = take_outputs(tensor, start, size).dequantize()
        rounded = round_to_nearest(part, spec).dequantize()
        energy = output_energy(jnp.concatenate([part - packed, part - rounded, part], axis=1), hessian)
        return jax.lax.dynamic_update_slice_in_dim(found, energy.reshape(3, size), start, axis=1)

    found = jnp.zeros((3, d_out), jnp.float32)
    return Outputs(jax.lax.fori_loop(0, -(-d_out // size), measure, found))
