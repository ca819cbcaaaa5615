"""What calibration says of the inputs of linear layers: a method's statistics, added up over the batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptq_jax.clock import Clock
from gptq_jax.hooks.experts import Routed
from gptq_jax.hooks.nnx import Input, Params, kernel_of
from gptq_jax.methods.base import LayerBatch, Method, Stats, with_hessian
from gptq_jax.models.quantizable import Block
from gptq_jax.parallel import DataParallel, ordered_sum
from gptq_jax.statistics import ExpertStats, init_experts, update_experts
from gptq_jax.stream import Round, Stream, places
from gptq_jax.tensor import all_finite

Group = tuple[str, ...]  # paths of layers that share an input


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


class Way(NamedTuple):
    """One way through a block.

    Attributes:
        stream: the states before it.
        params: the block's parameters on this way.
    """

    stream: Stream
    params: Params


def observe(
    block: Block, method: Method, ways: Sequence[Way], groups: Sequence[Group], *, keep: bool, clock: Clock
) -> list[Observed]:
    """What each group's shared input says.

    Args:
        block: that the layers are in.
        method: whose statistics these are.
        ways: that of the model as it is quantized so far, and that of the float model if the method asks for it.
        groups: layers that share an input.
        keep: inputs, so that they need not be computed again.
        clock: where seconds are counted.

    Raises:
        ValueError: by name: inputs that are not finite, are all zero, or not as many as the calibration has.
    """
    method = with_hessian(method)
    quantized, _ = ways[0]
    wanted = tuple(group[0] for group in groups)
    sums, tokens, expected = {}, dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    for path, group in zip(wanted, groups, strict=True):
        *stack, d_in, _ = kernel_of(ways[0].params, path).shape
        d_out = sum(kernel_of(ways[0].params, member).shape[-1] for member in group)
        sums[path] = _Sums(_Problem(method, stack[0] if stack else None, d_in, d_out), quantized.parallel)
    for (this, captured, rows), *floats in _rounds(block, ways, groups, keep, clock):
        for path in wanted:
            # Each input of the batch, padding included, comes by once; a layer that sees others says so here.
            real = this.real(rows[path]) if this.real_tokens is None else this.real_tokens
            seen = places(captured[path])
            expected[path] += real
            tokens[path] += real if seen == rows[path] else this.real(seen)
            with clock("hessian") as ready:
                ready(sums[path].add(captured[path], floats[0][1][path] if floats else None, this))
    found = []
    for path, group in zip(wanted, groups, strict=True):
        stats = sums[path].total()
        assert method.hessian is not None  # with_hessian saw to it
        hessian = method.hessian(stats.own if isinstance(stats, ExpertStats) else stats)
        _check(", ".join(block.prefix + member for member in group), hessian, tokens[path], expected[path])
        found.append(Observed(stats, hessian, expected[path]))
    return found


def look_again(block: Block, ways: Sequence[Way], groups: Sequence[Group], *, clock: Clock) -> None:
    """Compute what `observe` computed and kept of these groups, without adding anything up."""
    for _ in _rounds(block, ways, groups, True, clock):
        pass


def _rounds(
    block: Block, ways: Sequence[Way], groups: Sequence[Group], keep: bool, clock: Clock
) -> Iterator[tuple[tuple[Round, dict[str, Input], dict[str, int]], ...]]:
    """What is captured on all ways, round by round, once it is there."""
    captures = [way.stream.capture(block.forward, way.params, groups, keep=keep) for way in ways]
    for _ in ways[0].stream.rounds:
        with clock("forward") as ready:
            now = tuple(next(capture) for capture in captures)
            ready([captured for _, captured, _ in now])
        yield now
    for capture in captures:  # what comes after the last round
        next(capture, None)


class _Problem(NamedTuple):
    """Statistics of which shapes: hashable.

    Attributes:
        method: whose they are, with the Hessian.
        experts: None for a layer without.
    """

    method: Method
    experts: int | None
    d_in: int
    d_out: int

    def init(self) -> Stats:
        """Before the first batch."""
        if self.experts is None:
            return self.method.init(self.d_in, self.d_out)
        return init_experts(self.method, self.experts, self.d_in, self.d_out)

    def update(self, stats: Stats, x: Input, x_float: Input | None, mask: Bool[Array, "batch time"] | None) -> Stats:
        """With one more batch; `stats` are donated."""
        if isinstance(x, Routed):
            real = jnp.ones(places(x), bool) if mask is None else mask.reshape(-1)
            update = _of_own(self.method.update) if self.method.needs_float_inputs else self.method.update
            return update_experts(stats, x, real, update=update)
        batch = LayerBatch(_real_rows(x, mask), None if x_float is None else _real_rows(x_float, mask))
        return _jit(self.method.update)(stats, batch)


class _Sums:
    """Statistics while they are added up, by one device or by many."""

    def __init__(self, problem: _Problem, parallel: DataParallel) -> None:
        self._problem, self._parallel = problem, parallel
        if parallel.mesh is None:
            self._sums = problem.init()
        else:
            self._shapes = jax.eval_shape(problem.init)
            self._sums = ordered_sum.zeros(self._shapes, parallel.mesh)

    def add(self, x: Input, x_float: Input | None, this: Round) -> Any:
        """One more round; what to wait for."""
        if self._parallel.mesh is None:
            self._sums = self._problem.update(self._sums, x, x_float, this.mask)
        else:
            live = self._parallel.feed(this.live[list(self._parallel.here)])
            batches = (live, x, x_float, this.mask)
            shares = self._parallel.run(_share, self._problem, params=(), batches=batches)
            self._sums = ordered_sum.add(self._sums, shares, self._parallel.mesh)
        return self._sums

    def total(self) -> Stats:
        """On all devices."""
        if self._parallel.mesh is None:
            return self._sums
        return ordered_sum.whole(self._sums, self._shapes, self._parallel.mesh)


def _share(
    problem: _Problem,
    params: tuple[()],
    live: Bool[Array, "1"],
    x: Input,
    x_float: Input | None,
    mask: Bool[Array, "batch time"] | None,
) -> Stats:
    """What one device's batch adds, with a leading axis of one; zeros for a batch that is a repeat."""
    stats = problem.update(problem.init(), x, x_float, mask)
    return jax.tree.map(lambda leaf: jnp.where(live[0], leaf, jnp.zeros((), leaf.dtype))[None], stats)


def _real_rows(x: Any, mask: Bool[Array, "batch time"] | None) -> Float[Array, "tokens d_in"]:
    """Rows of padding become zero."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if mask is None else jnp.where(mask.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))


@lru_cache(maxsize=64)
def _of_own(update: Callable[[Stats, LayerBatch], Stats]) -> Callable[[Stats, LayerBatch], Stats]:
    """For experts: what the float model feeds one is of other tokens where it routes otherwise, so theirs are used."""
    return lambda stats, batch: update(stats, batch._replace(x_float=batch.x))


@lru_cache(maxsize=64)
def _jit(update: Callable[[Stats, LayerBatch], Stats]) -> Callable[[Stats, LayerBatch], Stats]:
    """The jitted function, the same one for every block."""
    return jax.jit(update, donate_argnums=0)


def _check(names: str, hessian: Array, tokens: int, expected: int) -> None:
    """Stop the run, naming the layers, where the Hessian cannot be what calibration should have made it."""
    if tokens != expected:
        raise ValueError(f"{names} saw {tokens} tokens, but the calibration has {expected}.")
    if not bool(all_finite(hessian)):
        raise ValueError(
            f"the inputs of {names} hold NaN or infinity: check the model's weights, or load it in float32."
        )
    if not bool(jnp.any(hessian)):
        raise ValueError(f"the inputs of {names} are all zero: the calibration says nothing about this layer.")
