"""Run the steps of a program with parameters that may be packed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from gptq_jax.hooks.layout import Factor, Layout, rearrange, view_of
from gptq_jax.hooks.program import Entry, Product, Program, Ref, Root, Step
from gptq_jax.matmul import matmul


@dataclass(frozen=True)
class Held:
    """The values of a parameter.

    Attributes:
        value: an array, or a packed matrix.
        factors: of its axes, in order; for a packed matrix of [*stack, d_in, d_out].
    """

    value: Any
    factors: tuple[Factor, ...]

    def seen(self, ref: Ref) -> Shaped[Array, "..."]:
        """The float parameter as `ref` sees it."""
        array = self.value if isinstance(self.value, jax.Array) else self.value.dequantize()
        return rearrange(array, self.factors, ref.view).astype(ref.dtype)


def hold(value: Any, layout: Layout | None) -> Held:
    """A parameter: a float array as the module has it, or the matrix of `layout`."""
    if layout is not None:
        return Held(value, layout.factors)
    return Held(value, tuple(factor for axis in view_of(value.shape) for factor in axis))


def evaluate(
    steps: Sequence[Step],
    values: dict[int, Any],
    held: Mapping[Root, Held],
    observe: Callable[[Root, Array], Array] | None = None,
) -> None:
    """Run steps, writing what they make into `values`.

    Args:
        steps: of one program.
        values: what they need, by number, the program's constants included.
        held: the parameters they use.
        observe: called with each weight and the input of its product; returns the input to use.
    """

    def read(entry: Entry) -> Any:
        if isinstance(entry, Ref):
            return held[entry.root].seen(entry)
        return entry.val if isinstance(entry, jex.Literal) else values[entry]

    for step in steps:
        if step.loop is not None:
            made: Any = _run_loop(step, read, held, observe)
        elif step.product is not None:
            made = [_run_product(step, step.product, read, held, observe)]
        else:
            made = step.run(*map(read, step.inputs))
        values |= zip(step.outputs, made, strict=True)


def results(program: Program, values: Mapping[int, Any], held: Mapping[Root, Held]) -> list[Any]:
    """What the program returns, once all of its steps have run."""
    return [
        held[entry.root].seen(entry)
        if isinstance(entry, Ref)
        else entry.val
        if isinstance(entry, jex.Literal)
        else values[entry]
        for entry in program.results
    ]


def _run_product(step: Step, product: Product, read: Any, held: Mapping[Root, Held], observe: Any) -> Array:
    root = product.weight.root
    weight = held[root]
    place = 1 if product.weight_first else 0
    x = read(step.inputs[place])
    if observe is not None:
        x = product.activations(observe(root, product.rows(x)), x.shape)
    if product.opaque:
        return x
    packed = not isinstance(weight.value, jax.Array)
    if not packed or weight.factors != (*product.inputs, *product.outputs):
        both = [x, weight.seen(product.weight)]
        return step.run(*(both[::-1] if product.weight_first else both))[0]
    rows = product.rows(x)
    # It may be asked for in more digits than its input has.
    wide = rows.astype(jnp.promote_types(rows.dtype, product.dtype))
    return product.result(matmul(wide, weight.value).astype(product.dtype))


def _run_loop(step: Step, read: Any, held: Mapping[Root, Held], observe: Any) -> list[Any]:
    loop = step.loop
    assert loop is not None
    plain: list[list[Any]] = [[], [], []]  # constants, carried, sliced
    fixed, sliced = dict(held), {}
    for position, entry in enumerate(step.inputs):
        part = 0 if position < loop.consts else 1 if position < loop.consts + loop.carried else 2
        if not isinstance(entry, Ref) or not loop.follows(position, entry):
            plain[part].append(read(entry))
        elif part == 2:
            sliced[entry.root] = _stacked(held[entry.root], entry)
    factors = {root: found.factors[1:] for root, found in sliced.items()}

    def turn(carry: Any, taken: Any) -> tuple[Any, Any]:
        slices, own = taken
        inside = {**fixed, **{root: Held(value, factors[root]) for root, value in own.items()}}
        values = {**loop.body.constants, **dict(zip(loop.body.arguments, [*plain[0], *carry, *slices], strict=True))}
        evaluate(loop.body.steps, values, inside, observe)
        found = results(loop.body, values, inside)
        return found[: loop.carried], found[loop.carried :]

    taken = (plain[2], {root: found.value for root, found in sliced.items()})
    carry, collected = jax.lax.scan(turn, plain[1], taken, length=loop.length, reverse=loop.reverse)
    return [*carry, *collected]


def _stacked(found: Held, ref: Ref) -> Held:
    """The parameter with the axis first that a loop takes slices of."""
    (first,) = ref.view[0]
    if found.factors[0] == first:
        if isinstance(found.value, jax.Array):
            return Held(found.value.reshape([factor.size for factor in found.factors]), found.factors)
        return found
    order = (first, *(factor for factor in found.factors if factor != first))
    array = found.value if isinstance(found.value, jax.Array) else found.value.dequantize()
    return Held(rearrange(array, found.factors, tuple((factor,) for factor in order)), order)
