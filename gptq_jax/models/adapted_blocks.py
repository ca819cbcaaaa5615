"""A traced call cut into blocks: which weights each one packs, and how it runs by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptq_jax.hooks.layout import Factor, Layout, rearrange, view_of
from gptq_jax.hooks.nnx import Params, kernel_of
from gptq_jax.hooks.program import InLayer, Product, Program, Ref, Root, Trail
from gptq_jax.hooks.segment import Segment, capture, run, segment_of
from gptq_jax.tensor import QuantizedTensor

_FLOAT = "(float)"  # the name, in a block's parameters, of those that stay as they are
OUTSIDE = "it is used outside of the blocks"


@dataclass(frozen=True)
class Layer:
    """A weight that is packed.

    Attributes:
        block: its number.
        path: inside the block.
        layout: of the parameter.
        rows: how many inputs it sees.
        fed: names its input: equal for layers that are fed the same array.
    """

    block: int
    path: str
    layout: Layout
    rows: int = field(compare=False)
    fed: Any = field(compare=False)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Of the matrix, one slice of it where it is stacked."""
        return (*self.layout.inputs, *self.layout.outputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What is known of one batch between two blocks: the values that later blocks need, by number."""

    values: dict[int, Any]
    plan: "Plan" = field(metadata={"static": True})


@dataclass(frozen=True)
class Part:
    """A segment in its place in a program.

    Attributes:
        segment: what it does.
        inputs, outputs: numbers of values in the program.
        roots: the parameters it uses.
        live: values that are needed after it.
    """

    segment: Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    roots: tuple[Root, ...]
    live: frozenset[int]


class Plan:
    """The blocks of one program.

    Attributes:
        parts: of each block: the steps from its first to the next block's.
        layers: the weights that are packed.
        kept_float: matrices that stay float, and why.
        refused: layers that cannot be packed unless a rule skips them, and why.
        alike: layers, by full path, that must have one grid: slices of one stacked parameter.
    """

    def __init__(self, program: Program, paths: Mapping[str, Any], *, named: bool):
        """Cut a program.

        Args:
            program: of unrolled loops.
            paths: the parameters.
            named: its blocks are marked; otherwise it is one block.
        """
        self.program = program
        keys = [_block_of(step.trail) if named else () for step in program.steps]
        firsts: dict[Any, int] = {}  # of each block that has products: its first step
        for number, _ in program.products():
            if keys[number] is not None:
                firsts.setdefault(keys[number], keys.index(keys[number]))
        begins = sorted(firsts.values())
        end = max((number for number, key in enumerate(keys) if key in firsts), default=-1) + 1
        self._keys, self._order = keys, sorted(firsts, key=firsts.__getitem__)
        self._stacks = {e.root: e.stack for step in program.steps for e in step.inputs if isinstance(e, Ref)}
        self._sort(paths)
        last_use = {e: number for number, step in enumerate(program.steps) for e in step.inputs if isinstance(e, int)}
        last_use |= {e: len(program.steps) for e in program.results if isinstance(e, int)}
        bounds = zip([0, *begins], [*begins, end], strict=True)
        self._prefix, *self.parts = [self._part(begin, end, last_use, paths) for begin, end in bounds]

    def _sort(self, paths: Mapping[str, Any]) -> None:
        """Which parameters are packed, and why the others are not."""
        uses: dict[Root, list[tuple[int, Product]]] = {}
        for number, product in self.program.products():
            uses.setdefault(product.weight.root, []).append((number, product))
        self.layers: dict[Root, Layer] = {}
        self.kept_float: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        alike: dict[str, list[str]] = {}
        for root, found in uses.items():
            number, product = found[0]
            key, name = self._keys[number], _full_path(root)
            if (reason := self._float_use(root)) is not None:
                self.kept_float[name] = f"{reason}, and it is the weight of a product too"
            elif key not in self._order:
                self.kept_float[name] = OUTSIDE
            elif len(found) > 1:
                blocks = sorted({_name(self._keys[number]) for number, _ in found} - {""})
                self.refused[_shown(root, key)] = (
                    f"{root.path} is the weight of {len(found)} products{' in ' if blocks else ''}{', '.join(blocks)}, "
                    "and would be quantized for each"
                )
            else:
                self.layers[root] = self._layer(number, product, paths[root.path])
                if root.turns:
                    alike.setdefault(root.path, []).append(_shown(root, key))
        self.alike = list(alike.values())
        for root, reason in self.program.float_uses.items():
            if len(paths[root.path].shape) - len(root.turns) > 1:
                self.kept_float.setdefault(_full_path(root), reason)
        touched = {root.path for root in self._stacks} | {root.path for root in self.program.float_uses}
        for path, leaf in paths.items():
            if len(leaf.shape) > 1 and path not in touched:
                self.kept_float[path.removesuffix(".kernel")] = "the call does not use it"

    def _float_use(self, root: Root) -> str | None:
        """Why the float parameter is needed, be it this slice of it or all."""
        found = (self.program.float_uses.get(Root(root.path, root.turns[:end])) for end in range(len(root.turns) + 1))
        return next((reason for reason in found if reason is not None), None)

    def _layer(self, number: int, product: Product, parameter: Any) -> Layer:
        key = self._keys[number] or ()
        layout = Layout(
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype),
            stack=product.weight.stack,
            inputs=product.inputs,
            outputs=product.outputs,
        )
        x = self.program.steps[number].inputs[1 if product.weight_first else 0]
        d_in = prod(factor.size for factor in layout.inputs)
        rows = self.program.avals[x].size // d_in if isinstance(x, int) else 0
        return Layer(
            self._order.index(key), _path_inside(product.weight.root, key), layout, rows, (x, product.contracted[0])
        )

    def _part(self, begin: int, end: int, last_use: Mapping[int, int], paths: Mapping[str, Any]) -> Part:
        steps = self.program.steps[begin:end]
        made = {number for step in steps for number in step.outputs}
        entries = [entry for step in steps for entry in step.inputs]
        inputs = tuple(dict.fromkeys(e for e in entries if isinstance(e, int) and e not in made))
        roots = tuple(dict.fromkeys(e.root for e in entries if isinstance(e, Ref)))
        live = frozenset(number for number, last in last_use.items() if last >= end)
        outputs = tuple(sorted(made & live))
        factors = tuple(
            self.layers[root].factors if root in self.layers else self._own(root, paths[root.path]) for root in roots
        )
        return Part(segment_of(steps, inputs, outputs, roots, factors), inputs, outputs, roots, live)

    def _own(self, root: Root, parameter: Any) -> tuple[Factor, ...]:
        """The factors of one slice of a parameter, in order."""
        return tuple(f for axis in view_of(parameter.shape) for f in axis if f not in self._stacks[root])

    def params(self, block: int, paths: Mapping[str, Any]) -> Params:
        """The parameters of a block: weights as matrices by path, and those beside them as they are."""
        found: Params = {_FLOAT: {}}
        for root in self.parts[block].roots:
            parameter = paths[root.path]
            array = _slice(parameter, root, self._stacks[root])
            if (layer := self.layers.get(root)) is None:
                found[_FLOAT][root] = array
            else:
                view = (layer.layout.inputs, layer.layout.outputs)
                _put(found, layer.path, rearrange(array, self._own(root, parameter), view))
        return found

    def weights(self, block: int, params: Params) -> list[Any]:
        """The parameters of a block in the order of its part's."""
        return [
            kernel_of(params, self.layers[root].path) if root in self.layers else params[_FLOAT][root]
            for root in self.parts[block].roots
        ]

    def numbers(self, block: int) -> dict[str, int]:
        """Of the packed weights of a block by path: their place among its part's parameters."""
        roots = enumerate(self.parts[block].roots)
        return {self.layers[root].path: number for number, root in roots if root in self.layers}

    def layer(self, block: int, path: str) -> Layer:
        """The layer at a path inside a block."""
        return self.layers[self.parts[block].roots[self.numbers(block)[path]]]

    def blocks(self, paths: Mapping[str, Any]) -> list["AdaptedBlock"]:
        """The blocks of a model with these parameters."""
        groups: list[dict[Any, list[str]]] = [{} for _ in self._order]
        for layer in self.layers.values():
            groups[layer.block].setdefault(layer.fed, []).append(layer.path)
        return [
            AdaptedBlock(
                plan=self,
                number=number,
                paths=paths,
                prefix=f"{_name(key)}." if key else "",
                groups=tuple(map(tuple, groups[number].values())),
            )
            for number, key in enumerate(self._order)
        ]

    def start(self, paths: Mapping[str, Any], arguments: Sequence[Any]) -> State:
        """What is known of a batch before the first block.

        Args:
            paths: the parameters.
            arguments: all that the program is called with.
        """
        values = {**self.program.constants, **dict(zip(self.program.arguments, arguments, strict=True))}
        part = self._prefix
        weights = [_slice(paths[root.path], root, self._stacks[root]) for root in part.roots]
        made = run(part.segment, [values[number] for number in part.inputs], weights, {})
        values |= zip(part.outputs, made, strict=True)
        return State({number: value for number, value in values.items() if number in part.live}, self)

    def check_mask(self, mask: Bool[Array, "batch time"] | None) -> None:
        """Raise ValueError if a layer sees other rows than the tokens of the mask."""
        if mask is None:
            return
        for root, layer in self.layers.items():
            if layer.rows != mask.size:
                raise ValueError(
                    f"{root.path} sees {layer.rows} inputs, but the batch's mask has {mask.size} tokens: "
                    "leave the mask out, and let batches hold no padding."
                )

    def gather(self, blocks: Sequence[Params]) -> dict[str, tuple[Layout, QuantizedTensor]]:
        """The packed parameters by path, slices of one stacked again, out of the blocks' parameters."""
        found: dict[str, list[tuple[tuple[int, ...], QuantizedTensor]]] = {}
        layouts = {}
        for root, layer in self.layers.items():
            kernel = kernel_of(blocks[layer.block], layer.path)
            if isinstance(kernel, QuantizedTensor):
                found.setdefault(root.path, []).append((root.turns, kernel))
                layouts[root.path] = layer.layout
        return {path: (layouts[path], _stack(slices, layouts[path])) for path, slices in found.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedBlock:
    """One block of a user's module; see `quantizable.Block` and `quantizable.Forward`, both of which it is."""

    plan: Plan
    number: int
    paths: Mapping[str, Any]
    prefix: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def params(self) -> Params:
        """See `Plan.params`."""
        return self.plan.params(self.number, self.paths)

    @property
    def forward(self) -> "AdaptedBlock":
        """Its own."""
        return self

    def run(self, params: Params, state: State, mask: Any, known: Mapping[str, Array]) -> State:
        """What later blocks need, after this one."""
        part = state.plan.parts[self.number]
        outputs = run(part.segment, *self._given(params, state, known))
        values = {**state.values, **dict(zip(part.outputs, outputs, strict=True))}
        return replace(state, values={number: value for number, value in values.items() if number in part.live})

    def capture(
        self, params: Params, state: State, wanted: tuple[str, ...], mask: Any, known: Mapping[str, Array]
    ) -> dict[str, Float[Array, "*batch d_in"]]:
        """The inputs of the layers `wanted`."""
        numbers = state.plan.numbers(self.number)
        segment = state.plan.parts[self.number].segment
        rows = capture(segment, *self._given(params, state, known), tuple(numbers[path] for path in wanted))
        return dict(zip(wanted, rows, strict=True))

    def rows(self, state: State, path: str) -> int:
        """How many inputs the layer at `path` sees."""
        return state.plan.layer(self.number, path).rows

    def _given(self, params: Params, state: State, known: Mapping[str, Array]) -> tuple[Any, Any, Any]:
        part, numbers = state.plan.parts[self.number], state.plan.numbers(self.number)
        inputs = [state.values[number] for number in part.inputs]
        return inputs, state.plan.weights(self.number, params), {numbers[path]: rows for path, rows in known.items()}


def _block_of(trail: Trail) -> tuple[str | int, ...] | None:
    """The innermost block that a step is in, with the turns of the loops around it."""
    last = max((place for place, entry in enumerate(trail) if isinstance(entry, str)), default=None)
    return None if last is None else tuple(entry for entry in trail[: last + 1] if not isinstance(entry, InLayer))


def _name(key: tuple[str | int, ...] | None) -> str:
    """Of a block: "layers.3", be it a module or a turn of a loop."""
    return ".".join(map(str, [key[-1], *(entry for entry in key if isinstance(entry, int))])) if key else ""


def _full_path(root: Root) -> str:
    path = root.path.removesuffix(".kernel")
    return path + "".join(f"[{turn}]" for turn in root.turns)


def _path_inside(root: Root, key: tuple[str | int, ...]) -> str:
    """Of a weight in its block; one beside the block's own keeps its whole path."""
    path, turns = root.path.removesuffix(".kernel"), root.turns
    if key and path.startswith(f"{key[-1]}."):
        path = path.removeprefix(f"{key[-1]}.")
        turns = turns[sum(isinstance(entry, int) for entry in key) :]
    return path + "".join(f"[{turn}]" for turn in turns)


def _shown(root: Root, key: Any) -> str:
    path = _path_inside(root, key)
    return f"{_name(key)}.{path}" if key else path


def _slice(array: Any, root: Root, stack: tuple[Factor, ...]) -> Any:
    """One slice of a stacked parameter, its other axes in order."""
    if not stack:
        return array
    view = view_of(array.shape)
    first = tuple((factor,) for factor in stack)
    rest = tuple(axis for axis in view if not (axis and axis[0] in stack))
    return rearrange(array, tuple(f for axis in view for f in axis), (*first, *rest))[root.turns]


def _stack(slices: list[tuple[tuple[int, ...], QuantizedTensor]], layout: Layout) -> QuantizedTensor:
    """Packed slices as one, in the order of their index."""
    tensors = [tensor for _, tensor in sorted(slices, key=lambda pair: pair[0])]
    if not layout.stack:
        return tensors[0]
    if len({tensor.group_of_row is None for tensor in tensors}) > 1:  # one of them fell back to rows in order
        tensors = [tensor if tensor.group_of_row is not None else _with_groups(tensor) for tensor in tensors]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
    sizes = [factor.size for factor in layout.stack]
    return jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), stacked)


def _with_groups(tensor: QuantizedTensor) -> QuantizedTensor:
    rows = jnp.arange(tensor.d_in, dtype=jnp.int32) // tensor.spec.group_rows(tensor.d_in)
    return replace(tensor, group_of_row=rows)


def _put(params: Params, path: str, kernel: Any) -> None:
    for name in path.split("."):
        params = params.setdefault(name, {})
    params["kernel"] = kernel
