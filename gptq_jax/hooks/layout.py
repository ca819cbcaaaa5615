"""A parameter of any rank as a matrix: which of its axes a product sums over, through transposes and reshapes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Shaped


class Factor(NamedTuple):
    """Part of an axis of a parameter; axes of size 1 have none.

    Attributes:
        place: the axis, then which part of it where it was split, major first.
        size: of the part.
    """

    place: tuple[int, ...]
    size: int


View = tuple[tuple[Factor, ...], ...]  # the axes of an array that holds a parameter, each as its factors


def view_of(shape: Sequence[int]) -> View:
    """A parameter as it is."""
    return tuple((Factor((axis,), size),) if size != 1 else () for axis, size in enumerate(shape))


def view_shape(view: View) -> tuple[int, ...]:
    """The shape of an array so viewed."""
    return tuple(prod(factor.size for factor in axis) for axis in view)


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """The view after a reshape; None where an axis would hold a part of a factor that is no divisor."""
    left, axes = list(chain.from_iterable(view)), []
    for size in shape:
        axis: list[Factor] = []
        while size > 1 and left:
            factor = left.pop(0)
            if factor.size > size and factor.size % size == 0:
                left.insert(0, Factor((*factor.place, 1), factor.size // size))
                factor = Factor((*factor.place, 0), size)
            if size % factor.size:
                return None
            axis.append(factor)
            size //= factor.size
        if size != 1:
            return None
        axes.append(tuple(axis))
    return None if left else tuple(axes)


def rearrange(array: Shaped[Array, "..."], held: Sequence[Factor], view: View) -> Shaped[Array, "..."]:
    """`array`, whose axes are the factors `held` in this order, as `view` sees the same parameter."""
    wanted = list(chain.from_iterable(view))
    fine = [
        part
        for factor in held
        for part in sorted(part for part in wanted if part.place[: len(factor.place)] == factor.place)
    ]
    array = array.reshape([factor.size for factor in fine])
    return array.transpose([fine.index(factor) for factor in wanted]).reshape(view_shape(view))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a parameter is a matrix, or a stack of them.

    Attributes:
        shape: of the parameter.
        dtype: of the parameter.
        stack: factors of the axes that count matrices: blocks under `scan`.
        inputs: factors of the axes that the product sums over, in the order of the input's.
        outputs: the others.
    """

    shape: tuple[int, ...]
    dtype: str
    stack: tuple[Factor, ...] = ()
    inputs: tuple[Factor, ...]
    outputs: tuple[Factor, ...]

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All, in the order of the matrix."""
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """[*stack, d_in, d_out]."""
        return view_shape((*((factor,) for factor in self.stack), self.inputs, self.outputs))

    def matrix(self, parameter: Float[Array, "..."]) -> Float[Array, "*stack d_in d_out"]:
        """The parameter as a matrix."""
        view = (*((factor,) for factor in self.stack), self.inputs, self.outputs)
        return rearrange(parameter, _in_order(self.factors), view)

    def parameter(self, matrix: Float[Array, "*stack d_in d_out"]) -> Float[Array, "..."]:
        """The inverse of `matrix`."""
        return rearrange(matrix, self.factors, tuple((factor,) for factor in _in_order(self.factors))).reshape(
            self.shape
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        factors = {name: [[list(f.place), f.size] for f in getattr(self, name)] for name in _FACTORS}
        return {"shape": list(self.shape), "dtype": self.dtype, **factors}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Layout":
        """The inverse of `to_json`; ValueError if the factors are not those of the shape."""
        factors = {
            name: tuple(Factor(tuple(map(int, place)), int(size)) for place, size in data[name]) for name in _FACTORS
        }
        found = cls(shape=tuple(map(int, data["shape"])), dtype=str(data["dtype"]), **factors)
        if any(
            prod(factor.size for factor in found.factors if factor.place[0] == axis) != size
            for axis, size in enumerate(found.shape)
        ):
            raise ValueError(f"factors {found.factors} are not those of a parameter of shape {found.shape}.")
        return found


_FACTORS = ("stack", "inputs", "outputs")


def _in_order(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    return tuple(sorted(factors))
