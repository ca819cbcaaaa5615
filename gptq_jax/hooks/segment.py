"""Some steps of a program, compiled apart and once for all blocks that do the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from gptq_jax.hooks.evaluate import Held, evaluate
from gptq_jax.hooks.layout import Factor
from gptq_jax.hooks.program import Ref, Root, Step


@dataclass(frozen=True)
class Segment:
    """Steps under numbers of their own; equal for blocks that do the same, which so share what is compiled.

    Attributes:
        key: says all that it does.
        steps: with values and parameters renumbered.
        inputs: how many values it needs; their numbers come first.
        outputs: numbers of the values it leaves.
        factors: of each parameter it uses, as they are given.
    """

    key: str
    steps: tuple[Step, ...] = field(compare=False)
    inputs: int
    outputs: tuple[int, ...]
    factors: tuple[tuple[Factor, ...], ...]


def segment_of(
    steps: Sequence[Step],
    inputs: Sequence[int],
    outputs: Sequence[int],
    roots: Sequence[Root],
    factors: tuple[tuple[Factor, ...], ...],
) -> Segment:
    """Steps of a program, apart from it.

    Args:
        steps: in their order.
        inputs: values of the program that they need.
        outputs: values they make that are wanted.
        roots: parameters they use.
        factors: of each of these, as it will be given.
    """
    numbers = {number: place for place, number in enumerate(inputs)}
    for step in steps:
        for number in step.outputs:
            numbers[number] = len(numbers)
    names = {root: Root(str(place)) for place, root in enumerate(roots)}

    def renamed(entry: Any) -> Any:
        if isinstance(entry, Ref):
            return replace(entry, root=names[entry.root])
        return numbers[entry] if isinstance(entry, int) else entry

    own = []
    for step in steps:
        product = step.product
        own.append(
            replace(
                step,
                inputs=tuple(map(renamed, step.inputs)),
                outputs=tuple(numbers[number] for number in step.outputs),
                trail=(),
                product=None if product is None else replace(product, weight=renamed(product.weight)),
            )
        )
    left = tuple(numbers[number] for number in outputs)
    said = [(step.label, [_said(entry) for entry in step.inputs], step.outputs, step.product) for step in own]
    return Segment(repr((said, len(inputs), left, factors)), tuple(own), len(inputs), left, factors)


def _said(entry: Any) -> Any:
    return (repr(entry.val), str(entry.aval)) if hasattr(entry, "val") else entry


@partial(jax.jit, static_argnums=0)
def run(segment: Segment, inputs: list[Any], weights: list[Any], known: dict[int, Array]) -> list[Any]:
    """The wanted values.

    Args:
        segment: what to do.
        inputs: the values it needs.
        weights: the parameters it uses: arrays, or packed matrices.
        known: inputs of products, by the number of the weight, that need not be computed again.
    """
    values = dict(enumerate(inputs))
    evaluate(segment.steps, values, _held(segment, weights), lambda root, x: known.get(int(root.path), x))
    return [values[number] for number in segment.outputs]


@partial(jax.jit, static_argnums=(0, 4))
def capture(
    segment: Segment, inputs: list[Any], weights: list[Any], known: dict[int, Array], wanted: tuple[int, ...]
) -> list[Array]:
    """The inputs [*batch, d_in] of the products with the weights `wanted`, by number; see `run`."""
    values, tape = dict(enumerate(inputs)), {}

    def observe(root: Root, x: Array) -> Array:
        tape[int(root.path)] = known.get(int(root.path), x)
        return tape[int(root.path)]

    evaluate(segment.steps, values, _held(segment, weights), observe)
    return [tape[number] for number in wanted]


def _held(segment: Segment, weights: list[Any]) -> dict[Root, Held]:
    pairs = zip(weights, segment.factors, strict=True)
    return {Root(str(place)): Held(value, factors) for place, (value, factors) in enumerate(pairs)}
