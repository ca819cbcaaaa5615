"""GPTQ (Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3, algorithm 1), computed as Babai's nearest plane.

With the Hessian H = R R^T (R upper triangular) and D = W - Q the error so far, the weight that GPTQ rounds next
is w_j = W_j + sum_{i<j} R_ij D_i / R_jj: the paper's update of the remaining weights, looked at from the left,
so that neither H^-1 nor any update of weights to come is needed. Rows are taken in blocks; what all earlier
blocks contribute to a block is one matrix product.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, UInt8

from gptq_jax import grids
from gptq_jax.hessian import accumulate, with_factor
from gptq_jax.methods.base import LayerBatch, Method, Solution, assemble
from gptq_jax.methods.rtn import split_groups
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import QuantizedTensor, all_finite

ORDERS = ("natural", "activation", "group")

State = TypeVar("State")

_BLOCK = 32  # rows rounded one by one between two matrix products
_CHUNK = 512  # rows of a super-block, whose sizes are static; at least: there are at most _CHUNKS
_CHUNKS = 8  # of them, so that compile time does not grow with d_in


@dataclass(frozen=True, kw_only=True)
class GPTQOptions:
    """How GPTQ goes about it; hashable.

    Attributes:
        order: in which inputs are rounded. "natural"; "activation": largest diagonal of the Hessian first
            (act-order); "group": whole groups by their largest diagonal, inside each by diagonal, so that rows
            stay with their group.
        static_groups: grids are fitted before solving, to the original weights in their original groups, so
            that any order leaves rows where they are. Otherwise a group's grid is fitted to its compensated
            weights when its turn comes, and activation order stores `group_of_row` (desc_act).
        grid: "minmax"; "mse": clip where the rounding error is least (norm 2.4); "ldl": the same, weighted by the
            pivots of the Hessian's LDL factorization, which is the error that compensation cannot take away.
        damping: fraction of the mean diagonal added to the Hessian; raised tenfold while it cannot be factored.
    """

    order: str = "activation"
    static_groups: bool = True
    grid: str = "ldl"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not supported: use one of {list(ORDERS)}.")
        if self.grid not in grids.GRIDS:
            raise ValueError(f"grid={self.grid!r} is not supported: use one of {list(grids.GRIDS)}.")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping={self.damping} is not in [0, 1]: use a fraction of the mean, e.g. 0.01.")


@lru_cache  # the same functions for the same options, so that jit knows them again
def gptq(*, order: str = "activation", static_groups: bool = True, grid: str = "ldl", damping: float = 0.01) -> Method:
    """GPTQ as a method of the pipeline; arguments as in `GPTQOptions`. Its statistics are the Hessian.

    Assumes that a layer does best where its own outputs change least, each layer by itself, and that the calibration's
    inputs are like those to come.
    """
    options = GPTQOptions(order=order, static_groups=static_groups, grid=grid, damping=damping)

    def init(d_in: int, d_out: int) -> Float[Array, "d_in d_in"]:
        return jnp.zeros((d_in, d_in), jnp.float32)

    def update(hessian: Float[Array, "d_in d_in"], batch: LayerBatch) -> Float[Array, "d_in d_in"]:
        return accumulate(hessian, batch.x)

    def solve(weight: Float[Array, "d_in d_out"], hessian: Float[Array, "d_in d_in"], spec: QuantSpec) -> Solution:
        return solve_layer(weight, hessian, spec, options)

    settings = tuple(asdict(options).items())
    return Method(
        init, update, solve, hessian=lambda hessian: hessian, name="gptq", settings=settings, independent_outputs=True
    )


def gptq_solve(
    weight: ArrayLike,
    hessian: ArrayLike,
    spec: QuantSpec | None = None,
    *,
    order: str = "activation",
    static_groups: bool = True,
    grid: str = "ldl",
    damping: float = 0.01,
) -> QuantizedTensor:
    """Quantize one weight so that its outputs change least on inputs with this Hessian; needs no model.

    Args:
        weight: (d_in, d_out), as in Flax.
        hessian: X^T X of the inputs X (tokens, d_in), times any positive factor.
        spec: the grid; 4 bits in groups of 128, symmetric, if None.
        order, static_groups, grid, damping: see `GPTQOptions`.

    Returns:
        The packed weight.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, a Hessian of zeros.

    Warns:
        UserWarning: the Hessian could not be factored with any damping, and the weight was rounded to nearest.
    """
    options = GPTQOptions(order=order, static_groups=static_groups, grid=grid, damping=damping)
    weight, hessian = jnp.asarray(weight), jnp.asarray(hessian)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {weight.shape}: pass (d_in, d_out), or use jax.vmap over a batch.")
    if hessian.shape != (weight.shape[0], weight.shape[0]):
        raise ValueError(
            f"hessian has shape {hessian.shape}, but weight {weight.shape} needs (d_in, d_in) = "
            f"{(weight.shape[0], weight.shape[0])}; kernels are (d_in, d_out), so transpose a torch weight."
        )
    traced = isinstance(weight, jax.core.Tracer) or isinstance(hessian, jax.core.Tracer)
    if not traced:
        for name, array in (("weight", weight), ("hessian", hessian)):
            if not bool(all_finite(array)):
                raise ValueError(f"{name} holds NaN or infinity.")
        if not bool(jnp.any(hessian)):
            raise ValueError("hessian is zero: it saw no inputs. To round to nearest, say so with method rtn().")
    solution = solve_layer(weight, hessian, spec or QuantSpec(), options)
    if not traced and bool(solution.notes["fell_back"]):
        warnings.warn("the Hessian could not be factored: the weight was rounded to nearest.", stacklevel=2)
    return solution.tensor


class _Rows(NamedTuple):
    """Original weights, and the order in which they are rounded; None: as they are."""

    weight: Float[Array, "rows d_out"]
    order: Integer[Array, "rows"] | None = None

    def take(self, here: slice) -> Float[Array, "_ d_out"]:
        """Some rows in solving order: all of them at once would be a copy of the weight."""
        return self.weight[here] if self.order is None else self.weight[self.order[here]]


class _Block(NamedTuple):
    """Rows in solving order: original weights, R^T D of the errors D before them, and their square of R."""

    weight: Float[Array, "rows d_out"]
    seen: Float[Array, "rows d_out"]
    upper: Float[Array, "rows rows"]


@partial(jax.jit, static_argnames=("spec", "options"))
def solve_layer(
    weight: Float[Array, "d_in d_out"],
    hessian: Float[Array, "d_in d_in"],
    spec: QuantSpec,
    options: GPTQOptions,
) -> Solution:
    """GPTQ for one weight; arrays only, nothing checked. Under `vmap`, experts.

    Returns:
        The tensor, with notes `damping` (as used) and `fell_back`.
    """
    d_in, d_out = weight.shape
    group_rows, groups = spec.group_rows(d_in), spec.groups(d_in)
    hessian = hessian.astype(jnp.float32)
    mean_diagonal = jnp.mean(jnp.diagonal(hessian))
    # Whole groups only: inputs that never fire, with weight zero, change nothing.
    padding = group_rows * groups - d_in
    hessian = jnp.pad(hessian, ((0, padding), (0, padding)))
    grouped = split_groups(weight.astype(jnp.float32), spec)

    order = input_order(jnp.diagonal(hessian), options.order, group_rows)
    back = jnp.argsort(order)
    moves = options.order != "natural"
    rows = _Rows(grouped.reshape(-1, d_out), order if moves else None)

    def solve(upper: Float[Array, "rows rows"]) -> tuple[UInt8[Array, "rows d_out"], grids.Grid]:
        # A column that is one group has the same grid either way: nothing comes before its first row.
        if options.static_groups or groups == 1:
            pivots = jnp.square(jnp.diagonal(upper))[back].reshape(groups, -1)
            grid = jax.lax.map(lambda group: grids.fit(options.grid, group[0], group[1], spec), (grouped, pivots))
            return _sweep_static(rows, upper, order // group_rows, grid, spec), grid
        turn = order[::group_rows] // group_rows if options.order == "group" else jnp.arange(groups)
        return _sweep_dynamic(rows, upper, turn, options.grid, spec, group_rows)

    (codes, grid), damping, succeeded = with_factor(
        hessian, options.damping, mean_diagonal, solve, order if moves else None
    )
    moved = options.order == "activation" and not options.static_groups and groups > 1
    group_of_row = (back // group_rows)[:d_in] if moved else None
    codes = codes[back] if moves else codes
    tensor = assemble(codes[:d_in], grid, spec, group_of_row)
    return Solution(tensor, {"damping": damping, "fell_back": ~succeeded})


def input_order(diagonal: Float[Array, "d_in"], order: str, group_rows: int) -> Integer[Array, "d_in"]:
    """The permutation called `order` (one of ORDERS): entry k is the input rounded k-th."""
    if order == "natural":
        return jnp.arange(diagonal.shape[0])
    if order == "activation":
        return jnp.argsort(-diagonal, stable=True)
    grouped = diagonal.reshape(-1, group_rows)
    turn = jnp.argsort(-jnp.max(grouped, axis=1), stable=True)
    within = jnp.argsort(-grouped, axis=1, stable=True)
    return (turn[:, None] * group_rows + within[turn]).reshape(-1)


def _sweep_static(
    weights: _Rows,
    upper: Float[Array, "rows rows"],
    group_of_row: Integer[Array, "rows"],
    grid: grids.Grid,
    spec: QuantSpec,
) -> UInt8[Array, "rows d_out"]:
    """Codes of all rows on grids known beforehand."""
    rows = weights.weight.shape[0]
    block = min(_BLOCK, rows)
    if padding := -rows % block:
        order = None if weights.order is None else jnp.append(weights.order, jnp.arange(rows, rows + padding))
        weights = _Rows(jnp.pad(weights.weight, ((0, padding), (0, 0))), order)
        ones = (jnp.arange(rows + padding) >= rows).astype(jnp.float32)
        upper = jnp.pad(upper, ((0, padding), (0, padding))) + jnp.diag(ones)
        group_of_row = jnp.pad(group_of_row, (0, padding))

    def leaf(at: Array, block: _Block, state: None) -> tuple[Array, Array, None]:
        home = jax.lax.dynamic_slice_in_dim(group_of_row, at, block.weight.shape[0])
        return *_round_rows(block, lambda j: jax.tree.map(lambda leaf: leaf[home[j]], grid), spec), None

    return _sweep(weights, None, upper, block, leaf, None)[1][:rows]


def _sweep_dynamic(
    weights: _Rows,
    upper: Float[Array, "rows rows"],
    turn: Integer[Array, "groups"],
    grid_name: str,
    spec: QuantSpec,
    group_rows: int,
) -> tuple[UInt8[Array, "rows d_out"], grids.Grid]:
    """Codes, and grids fitted to each group's compensated weights; the k-th group solved is number turn[k]."""
    inner = max(size for size in range(1, _BLOCK + 1) if group_rows % size == 0)
    inner = group_rows if inner < _BLOCK // 4 else inner  # no divisor is worth a loop of its own

    groups = turn.shape[0]
    each = jnp.arange(groups)
    squares = upper.reshape(groups, group_rows, groups, group_rows)[each, :, each]
    identity = jnp.eye(group_rows, dtype=jnp.float32)
    # All of them at once: a LAPACK call inside the loop leaves its threads in the way of the products.
    inverses = jax.vmap(lambda square: solve_triangular(square, identity, lower=False))(squares)

    def leaf(at: Array, group: _Block, fitted: grids.Grid) -> tuple[Array, Array, grids.Grid]:
        # What the paper's updates have made of these weights by now.
        compensated = group.weight + _matmul(inverses[at // group_rows].T, group.seen)
        grid = grids.fit(grid_name, compensated, jnp.square(jnp.diagonal(group.upper)), spec)
        home = turn[at // group_rows]
        fitted = jax.tree.map(lambda all_, one: all_.at[home].set(one), fitted, grid)
        if inner == group_rows:
            return *_round_rows(group, lambda j: grid, spec), fitted
        errors, codes, _ = _sweep(
            _Rows(group.weight),
            group.seen,
            group.upper,
            inner,
            lambda at, block, state: (*_round_rows(block, lambda j: grid, spec), state),
            None,
        )
        return jnp.concatenate(errors), codes, fitted

    empty = jnp.zeros((groups, weights.weight.shape[1]), jnp.float32)
    return _sweep(weights, None, upper, group_rows, leaf, grids.Grid(empty, empty))[1:]


def _sweep(
    rows: _Rows,
    seen: Float[Array, "rows d_out"] | None,
    upper: Float[Array, "rows rows"],
    size: int,
    leaf: Callable[[Array, _Block, State], tuple[Array, Array, State]],
    state: State,
) -> tuple[list[Float[Array, "_ d_out"]], UInt8[Array, "rows d_out"], State]:
    """Visit `rows` in blocks of `size`, which divides them, gathering for each what the errors before it add.

    Args:
        rows: all of them.
        seen: R^T D of errors D before the first; None: there are none.
        upper: their square of R.
        size: rows of a block.
        leaf: (first row, block, state) -> (errors and codes of the block, state).
        state: what leaves hand on.

    Returns:
        The errors W - Q in pieces, the codes, and the last state.
    """
    total = rows.weight.shape[0]
    chunk = size * math.ceil(max(_CHUNK, total / _CHUNKS) / size)
    done: list[tuple[slice, Array]] = []
    all_codes = []
    for start in range(0, total, chunk):  # at most _CHUNKS times, whatever the size of the matrix
        here = slice(start, start + chunk)
        weight, square = rows.take(here), upper[here, here]
        before = jnp.zeros_like(weight) if seen is None else seen[here]
        # Piece by piece: put together, the errors so far would be copied at every turn.
        for there, errors in done:
            before = before + _matmul(upper[there, here].T, errors)

        def visit(
            k: Array,
            carry: tuple[Array, Array, State],
            start: int = start,
            weight: Array = weight,
            square: Array = square,
            before: Array = before,
        ) -> tuple[Array, Array, State]:
            errors, codes, state = carry
            at = k * size
            columns = jax.lax.dynamic_slice_in_dim(square, at, size, axis=1)
            # Errors from row `at` on are still zero, so that all rows can take part in the product.
            block = _Block(
                jax.lax.dynamic_slice_in_dim(weight, at, size),
                jax.lax.dynamic_slice_in_dim(before, at, size) + _matmul(columns.T, errors),
                jax.lax.dynamic_slice_in_dim(columns, at, size),
            )
            new_errors, new_codes, state = leaf(start + at, block, state)
            errors = jax.lax.dynamic_update_slice_in_dim(errors, new_errors, at, axis=0)
            return errors, jax.lax.dynamic_update_slice_in_dim(codes, new_codes, at, axis=0), state

        empty = jnp.zeros_like(weight), jnp.zeros(weight.shape, jnp.uint8), state
        errors, codes, state = jax.lax.fori_loop(0, weight.shape[0] // size, visit, empty)
        done.append((here, errors))
        all_codes.append(codes)
    return [errors for _, errors in done], jnp.concatenate(all_codes), state


def _round_rows(
    rows: _Block, grid_of: Callable[[Array], grids.Grid], spec: QuantSpec
) -> tuple[Float[Array, "rows d_out"], UInt8[Array, "rows d_out"]]:
    """Round rows one after another, each compensated for the errors before it.

    Args:
        rows: a block.
        grid_of: row -> its grid.
        spec: the grid's bits.

    Returns:
        The errors W - Q, and the codes.
    """
    diagonal = jnp.diagonal(rows.upper)
    # Row j: R_ij / R_jj of all i, transposed to lie contiguous.
    influence = (rows.upper / diagonal[None]).T
    compensated = rows.weight + rows.seen / diagonal[:, None]

    def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, codes = carry
        grid = grid_of(j)
        code = grids.quantize(compensated[j] + _matmul(influence[j], errors), grid, spec)
        error = rows.weight[j] - grids.dequantize(code, grid)
        return errors.at[j].set(error), codes.at[j].set(code.astype(jnp.uint8))

    empty = jnp.zeros_like(rows.weight), jnp.zeros(rows.weight.shape, jnp.uint8)
    return jax.lax.fori_loop(0, rows.weight.shape[0], step, empty)


def _matmul(a: Array, b: Array) -> Array:
    # A GPU's default for float32 is TF32, which is not enough here.
    return jnp.matmul(a, b, precision="highest")
