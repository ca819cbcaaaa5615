"""What a traced function does with its parameters: steps in the order they run, products with a weight among them.

A weight is found by following a parameter from the function's arguments through transposes, reshapes and casts
to the one product that uses it, so the layer it belongs to may be of any class. Anything else done to a
parameter is a use that only the float one can serve, and is noted with its reason.

`jax.make_jaxpr` gives the trace; calls inside it (jit, remat, custom derivatives) are followed where a
parameter goes into them, and loops of `scan` too, either unrolled or as loops.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from gptq_jax.hooks.layout import Factor, View, reshape, view_of, view_shape
from gptq_jax.hooks.registry import marked_input, registered_in

_MARK = re.compile(r"gptq_jax\.block\(([^)]*)\)")
_CALLS = {  # primitive -> its parameter that holds what is called
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_RESHAPES = ("reshape", "squeeze", "expand_dims")
_SAME = ("copy", "copy_p", "sharding_constraint", "convert_element_type")


def mark(block: str) -> Any:
    """A context: what is traced in it belongs to this block."""
    return jax.named_scope(f"gptq_jax.block({block})")


class Root(NamedTuple):
    """A parameter, or one slice of a stacked one.

    Attributes:
        path: of the parameter.
        turns: of the unrolled loops that take slices of it, outermost first; which slice it is.
    """

    path: str
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ref:
    """A parameter as it is seen at some point of the program.

    Attributes:
        root: which.
        view: its axes here.
        dtype: it was cast to.
        ndim: axes of the parameter.
        stack: those that loops have taken one slice of.
    """

    root: Root
    view: View
    dtype: Any
    ndim: int
    stack: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Product:
    """A step that multiplies activations with a weight.

    Attributes:
        weight: as the product sees it.
        contracted: axes of the activations and of the weight that are summed over, by the activations' order.
        weight_first: the weight's free axes come before the activations' in the result.
        inputs, outputs: factors of the weight's matrix.
        dtype: of the result.
        opaque: the step only shows the input of a registered layer, which itself makes the product later.
    """

    weight: Ref
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    weight_first: bool
    inputs: tuple[Factor, ...]
    outputs: tuple[Factor, ...]
    dtype: Any
    opaque: bool = False

    def rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "*batch d_in"]:
        """The activations as the matrix is multiplied with."""
        axes = self.contracted[0]
        moved = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        return moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)

    def activations(self, rows: Shaped[Array, "*batch d_in"], shape: Sequence[int]) -> Shaped[Array, "..."]:
        """The inverse of `rows`."""
        axes = self.contracted[0]
        moved = rows.reshape(*rows.shape[:-1], *(shape[axis] for axis in axes))
        return jnp.moveaxis(moved, range(moved.ndim - len(axes), moved.ndim), axes)

    def result(self, y: Shaped[Array, "*batch d_out"]) -> Shaped[Array, "..."]:
        """What the step gives, from the product with the matrix."""
        free = [size for axis, size in enumerate(view_shape(self.weight.view)) if axis not in self.contracted[1]]
        y = y.reshape(*y.shape[:-1], *free)
        return jnp.moveaxis(y, range(y.ndim - len(free), y.ndim), range(len(free))) if self.weight_first else y


class InLayer(NamedTuple):
    """Inside the registered layer whose weight is at this path."""

    weight: str


Trail = tuple[str | int | InLayer, ...]
Entry = int | Ref | jex.Literal  # a value by its number, a parameter, or a constant


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        run: from the values of `inputs` to a list of those of `outputs`.
        label: says what `run` does; equal labels do the same.
        inputs: of it.
        outputs: numbers of the values it makes.
        trail: the blocks (str), turns of unrolled loops (int) and registered layers that it is in, outermost first.
        product: set where it multiplies with a weight.
        loop: set where it is a loop with weights in it.
    """

    run: Callable[..., Sequence[Any]]
    label: str
    inputs: tuple[Entry, ...]
    outputs: tuple[int, ...]
    trail: Trail = ()
    product: Product | None = None
    loop: "Loop | None" = None


@dataclass(frozen=True)
class Loop:
    """A scan whose body uses weights. Its inputs: `consts`, then the carried, then what it takes slices of."""

    body: "Program"
    consts: int
    carried: int
    length: int
    reverse: bool

    def follows(self, position: int, ref: Ref) -> bool:
        """Whether the body sees the parameter at this input as one, not as any value."""
        sliced = position >= self.consts + self.carried
        return position < self.consts or (sliced and bool(ref.view[0]) and _sliceable(ref))


@dataclass
class Program:
    """All steps of a function.

    Attributes:
        steps: in the order they run.
        arguments: numbers of the values it is called with, parameters apart.
        results: what it returns, flat.
        constants: values that the trace holds.
        float_uses: parameters and why the float one is needed.
        avals: shapes and dtypes of all values, by number.
    """

    steps: list[Step] = field(default_factory=list)
    arguments: tuple[int, ...] = ()
    results: tuple[Entry, ...] = ()
    constants: dict[int, Any] = field(default_factory=dict)
    float_uses: dict[Root, str] = field(default_factory=dict)
    avals: dict[int, Any] = field(default_factory=dict)

    def products(self) -> Iterator[tuple[int, Product]]:
        """Every product with a weight, and the number of its step."""
        for number, step in enumerate(self.steps):
            if step.product is not None:
                yield number, step.product


def trace(
    function: Callable[..., Any], params: Mapping[str, Any], arguments: Sequence[Any], *, unroll: bool
) -> tuple[Program, Any]:
    """The program of `function(params, arguments)`.

    Args:
        function: to be traced; its first argument is a dict of parameters by path.
        params: shapes and dtypes.
        arguments: shapes and dtypes of its other arguments, flat.
        unroll: loops that take slices of parameters turn by turn; otherwise they stay loops.

    Returns:
        The program, and the structure of what it returns.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(params, list(arguments))
    builder = _Builder(unroll)
    refs: list[Entry] = [
        Ref(Root(path), view_of(leaf.shape), jnp.dtype(leaf.dtype), len(leaf.shape))
        for path, leaf in sorted(params.items())  # the order of a dict's leaves
    ]
    given = [builder.new(jax.typeof(leaf) if not hasattr(leaf, "shape") else leaf) for leaf in arguments]
    builder.program.arguments = tuple(given)
    builder.program.results = tuple(builder.walk(closed, [*refs, *given], ()))
    return builder.program, jax.tree.structure(out_shape)


class _Builder:
    def __init__(self, unroll: bool):
        self.unroll = unroll
        self.program = Program()
        self.parameters: dict[str, Ref] = {}  # as the innermost loop sees them
        self.casts: dict[tuple[int, str], Entry] = {}  # a value cast twice is one value: layers share their input

    def new(self, aval: Any) -> int:
        number = len(self.program.avals)
        self.program.avals[number] = aval
        return number

    def add(self, run: Callable[..., Any], label: str, inputs: Sequence[Entry], avals: Sequence[Any], **more: Any):
        outputs = tuple(self.new(aval) for aval in avals)
        self.program.steps.append(Step(run, label, tuple(inputs), outputs, **more))
        return outputs

    def walk(self, jaxpr: Any, arguments: Sequence[Entry], trail: Trail) -> list[Entry]:
        """Add the steps of a jaxpr; returns what it returns."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Entry] = {}
        for var, value in zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True):
            number = env[var] = self.new(var.aval)
            self.program.constants[number] = value
        env |= zip(inner.invars, arguments, strict=True)
        self.parameters |= {entry.root.path: entry for entry in arguments if isinstance(entry, Ref)}

        def read(atom: Any) -> Entry:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in inner.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            names = str(eqn.source_info.name_stack)
            here = (*trail, *_MARK.findall(names), *map(InLayer, registered_in(names)))
            env |= zip(eqn.outvars, self.equation(eqn, inputs, here), strict=True)
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: Any, inputs: list[Entry], trail: Trail) -> Sequence[Entry]:
        name, out = eqn.primitive.name, [var.aval for var in eqn.outvars]
        refs = [entry for entry in inputs if isinstance(entry, Ref)]
        if (marked := marked_input(eqn)) is not None and marked[0] in self.parameters:
            shown = _registered(self.parameters[marked[0]], marked[1], out[0])
            entries = [*inputs, shown.weight]
            return self.add(lambda x, weight: [x], "input of a layer", entries, out, trail=trail, product=shown)
        # Where no gradient is wanted, a function with one of its own is no more than its body.
        if not refs and not (self.unroll and name.startswith("custom_") and name in _CALLS):
            return self.plain(eqn, inputs, trail)
        if name in _CALLS:
            return self.walk(eqn.params[_CALLS[name]], inputs, trail)
        if name == "scan":
            once = eqn.params["length"] == 1
            return (self.unrolled if self.unroll or once else self.loop)(eqn, inputs, trail)
        if len(refs) == len(inputs) == 1 and (seen := _look_through(eqn, refs[0])) is not None:
            return [seen]
        if any(InLayer(ref.root.path) in trail for ref in refs):
            return self.plain(eqn, inputs, trail)
        if name == "dot_general" and len(refs) == 1:
            product = _product(eqn, inputs)
            if product is not None:
                return self.add(partial(_bind, eqn), _label(eqn), inputs, out, trail=trail, product=product)
        for ref in refs:
            if name != "add":  # a bias is no weight that one could miss
                self.program.float_uses.setdefault(ref.root, _reason(eqn))
        return self.plain(eqn, inputs, trail)

    def plain(self, eqn: Any, inputs: list[Entry], trail: Trail) -> Sequence[Entry]:
        avals, first = [var.aval for var in eqn.outvars], inputs[0] if inputs else None
        if eqn.primitive.name == "convert_element_type" and isinstance(first, int):
            key = first, str(avals[0].dtype)
            if key not in self.casts:
                (self.casts[key],) = self.add(partial(_bind, eqn), _label(eqn), inputs, avals, trail=trail)
            return [self.casts[key]]
        return self.add(partial(_bind, eqn), _label(eqn), inputs, avals, trail=trail)

    def unrolled(self, eqn: Any, inputs: list[Entry], trail: Trail) -> list[Entry]:
        consts, carried, length = _scan_sizes(eqn)
        fixed, carry, taken = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
        order = range(length)[::-1] if eqn.params["reverse"] else range(length)
        slices = {turn: [self.slice(entry, turn, trail) for entry in taken] for turn in order}
        collected: dict[int, list[Entry]] = {}
        for turn in order:
            results = self.walk(eqn.params["jaxpr"], [*fixed, *carry, *slices[turn]], (*trail, turn))
            carry, collected[turn] = results[:carried], results[carried:]
        outs: list[Entry] = list(carry)
        for position, var in enumerate(eqn.outvars[carried:]):
            parts = [collected[turn][position] for turn in range(length)]
            outs.extend(self.add(lambda *parts: [jnp.stack(parts)], "stack", parts, [var.aval], trail=trail))
        return outs

    def slice(self, entry: Entry, turn: int, trail: Trail) -> Entry:
        if isinstance(entry, Ref) and _sliceable(entry):
            turns = (*entry.root.turns, turn) if entry.view[0] else entry.root.turns
            return replace(_slice(entry), root=entry.root._replace(turns=turns))
        if isinstance(entry, Ref):
            self.program.float_uses.setdefault(entry.root, "a loop takes slices across its axes")
            shape, dtype = view_shape(entry.view), entry.dtype
        else:
            aval: Any = self.program.avals[entry] if isinstance(entry, int) else entry.aval
            shape, dtype = aval.shape, aval.dtype
        sliced = jax.ShapeDtypeStruct(shape[1:], dtype)
        return self.add(lambda array: [array[turn]], f"slice {turn}", [entry], [sliced], trail=trail)[0]

    def loop(self, eqn: Any, inputs: list[Entry], trail: Trail) -> Sequence[int]:
        consts, carried, length = _scan_sizes(eqn)
        body = _Builder(False)
        loop = Loop(body.program, consts, carried, length, eqn.params["reverse"])
        arguments: list[Entry] = []
        for position, (entry, var) in enumerate(zip(inputs, _open(eqn.params["jaxpr"]).invars, strict=True)):
            if isinstance(entry, Ref) and loop.follows(position, entry):
                arguments.append(entry if position < consts else _slice(entry))
            else:
                arguments.append(body.new(var.aval))
                if isinstance(entry, Ref):
                    self.program.float_uses.setdefault(entry.root, "a loop changes it")
        body.program.arguments = tuple(entry for entry in arguments if isinstance(entry, int))
        body.program.results = tuple(body.walk(eqn.params["jaxpr"], arguments, trail))
        for root, reason in body.program.float_uses.items():
            self.program.float_uses.setdefault(root, reason)
        avals = [var.aval for var in eqn.outvars]
        return self.add(partial(_bind, eqn), "loop", inputs, avals, trail=trail, loop=loop)


def _sliceable(ref: Ref) -> bool:
    """Whether the first axis is one of the parameter's own, or of size 1."""
    return all(len(factor.place) == 1 for factor in ref.view[0]) and len(ref.view[0]) <= 1


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _scan_sizes(eqn: Any) -> tuple[int, int, int]:
    """Constants, carried values and turns of a scan."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["length"]
    consts, carried, _ = eqn.params["ft_in"].elts  # since jax 0.12
    return len(consts), len(carried), eqn.params["length"]


def _slice(ref: Ref) -> Ref:
    return replace(ref, view=ref.view[1:], stack=(*ref.stack, *ref.view[0]))


def _bind(eqn: Any, *values: Any) -> Sequence[Any]:
    """Run an equation, as `jax.core.eval_jaxpr` does."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _label(eqn: Any) -> str:
    held = [id(const) for value in eqn.params.values() for const in getattr(value, "consts", ())]
    return f"{eqn.primitive.name} {eqn.params} {held}"


def _look_through(eqn: Any, ref: Ref) -> Ref | None:
    """The parameter after an operation that only rearranges or casts it."""
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if name in _SAME:
        return replace(ref, dtype=aval.dtype) if jnp.issubdtype(aval.dtype, jnp.floating) else None
    if name == "transpose":
        return replace(ref, view=tuple(ref.view[axis] for axis in eqn.params["permutation"]))
    adds_ones = name == "broadcast_in_dim" and aval.size == eqn.invars[0].aval.size
    if name in _RESHAPES or adds_ones:
        view = reshape(ref.view, aval.shape)
        return None if view is None else replace(ref, view=view)
    return None


def _product(eqn: Any, inputs: list[Entry]) -> Product | None:
    (lhs, rhs), batch = eqn.params["dimension_numbers"]
    if any(batch) or not lhs:
        return None
    weight_first = isinstance(inputs[0], Ref)
    weight = inputs[0] if weight_first else inputs[1]
    assert isinstance(weight, Ref)
    pairs = sorted(zip(rhs, lhs, strict=True) if weight_first else zip(lhs, rhs, strict=True))
    x_axes, axes = tuple(x for x, _ in pairs), tuple(axis for _, axis in pairs)
    chosen = tuple(factor for axis in axes for factor in weight.view[axis])
    others = tuple(factor for axis, factors in enumerate(weight.view) if axis not in axes for factor in factors)
    if not chosen or not others:
        return None
    return Product(weight, (x_axes, axes), weight_first, chosen, others, eqn.outvars[0].aval.dtype)


def _registered(ref: Ref, axes: tuple[int, ...], x: Any) -> Product:
    """The product of a registered layer, by the axes of its parameter, stacked ones left out."""
    factors = sorted(factor for axis in ref.view for factor in axis)
    own = [axis for axis in range(ref.ndim) if axis not in {factor.place[0] for factor in ref.stack}]
    if max(axes) >= len(own):
        raise ValueError(f"inputs={axes} of a registered layer name no axes of {ref.root.path}, which has {len(own)}.")
    view = tuple(tuple(f for f in factors if f.place[0] == axis) for axis in own)
    inputs = tuple(factor for axis in axes for factor in view[axis])
    outputs = tuple(f for axis, parts in enumerate(view) if axis not in axes for f in parts)
    if (d_in := prod(factor.size for factor in inputs)) != prod(x.shape[x.ndim - len(axes) :]):
        raise ValueError(
            f"{ref.root.path} has {d_in} inputs as its layer is registered, but is fed an array of shape {x.shape}."
        )
    contracted = tuple(range(x.ndim - len(axes), x.ndim)), axes
    return Product(replace(ref, view=view), contracted, False, inputs, outputs, x.dtype, opaque=True)


def _reason(eqn: Any) -> str:
    name = eqn.primitive.name
    if name == "gather":
        return "it is looked up by index"
    if name == "dot_general":
        _, (batch, _) = eqn.params["dimension_numbers"]
        return (
            "its product has batch axes, each with inputs of its own" if batch else "its product is no matrix product"
        )
    if name in ("while", "cond"):
        return f"it is used inside a {name}, which is not followed"
    return f"{name!r} is applied to it before any product"
