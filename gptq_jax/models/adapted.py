"""A user's own Flax module, unchanged, as a model that can be quantized, called and stored."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze

from gptq_jax.hooks.evaluate import evaluate, hold, results
from gptq_jax.hooks.layout import Layout
from gptq_jax.hooks.linen import LinenFunction
from gptq_jax.hooks.nnx import Params
from gptq_jax.hooks.nnx_function import NnxFunction
from gptq_jax.hooks.program import Program, Root, trace
from gptq_jax.matmul import is_packed
from gptq_jax.models.adapted_blocks import Plan
from gptq_jax.models.identity import digest_arrays
from gptq_jax.models.quantizable import Calibration

IsBlock = Callable[[str, Any], bool]


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A module with its parameters, float or quantized; call it as the module is called.

    It is a pytree of its arrays: it goes through `jax.jit`, `jax.device_put` and `jax.tree.map` like them.

    Attributes:
        function: how the module is called.
        params: the module's own tree, with a QuantizedTensor in place of each packed parameter.
        state: variables of the module that are no parameters.
        layouts: of packed parameters by path.
        blocks: which modules are blocks.
        tokenizer: a transformers fast tokenizer, or None.
        report: the quantization report as JSON data, or None for a float model.
    """

    function: Any
    params: Any
    state: Any
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    blocks: str | IsBlock | None = None
    tokenizer: Any = None
    report: dict[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; compiled once for each set of shapes and static arguments.

        Raises:
            ValueError: the module cannot be called so, or its parameters do not fit.
        """
        call = Call.of(self.function, args, kwargs, "the call")
        return _run(self, call.static, call.arrays)

    def calibration(self, calls: Sequence[Any], masks: Sequence[Any]) -> Calibration:
        """The model block by block on these inputs; see `BlockModel`.

        Args:
            calls: an array, a tuple of arguments, or a dict of keyword arguments, each.
            masks: for each, True for real tokens, [batch, time]; None if all are.

        Raises:
            ValueError: the module cannot be called so, `blocks` names none, or its parameters do not fit.
        """
        made = [Call.from_batch(self.function, call, f"batches[{number}]") for number, call in enumerate(calls)]
        paths = self.by_path()
        is_block = block_finder(self.blocks, paths) or (lambda path, module: False)
        plans: dict[Any, Plan] = {}
        for call in made:
            if call.signature not in plans:
                program, _ = _trace(self, call.static, call.arrays, is_block, unroll=True)
                plans[call.signature] = Plan(program, paths, named=self.blocks is not None)
        first, *others = plans.values()
        if any(other.layers != first.layers for other in others):  # but for how many inputs they see
            raise ValueError("batches of different shapes take different ways through the module: quantize with one.")
        if not first.layers:
            where = "" if self.blocks is None else f" in blocks={self.blocks!r}"
            raise ValueError(f"{self.function.name} multiplies with no weight that can be packed{where}.")
        real = [None if mask is None else jnp.asarray(mask, bool) for mask in masks]
        for call, mask in zip(made, real, strict=True):
            plans[call.signature].check_mask(mask)
        state = jax.tree.leaves(self.state)

        def assemble(blocks: Sequence[Params], report: dict[str, Any]) -> AdaptedModel:
            packed = first.gather(blocks)
            params = jax.tree_util.tree_map_with_path(
                lambda where, leaf: packed[name_of(where)][1] if name_of(where) in packed else leaf, self.params
            )
            layouts = {path: layout for path, (layout, _) in packed.items()}
            return replace(self, params=params, layouts=layouts, report=report)

        return Calibration(
            blocks=first.blocks(paths),
            start=lambda: (plans[call.signature].start(paths, [*state, *call.arrays]) for call in made),
            masks=real,
            kept_float=first.kept_float,
            refused=first.refused,
            alike=first.alike,
            assemble=assemble,
            one_device="a module of your own is quantized on one",
        )

    def identity(self) -> dict[str, str]:
        """What tells this model from another; see `quantizable.BlockModel`."""
        return {"weights": digest_arrays((self.params, self.state))}

    def by_path(self) -> dict[str, Any]:
        """The parameters by dotted path."""
        return {
            name_of(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(self.params, is_leaf=is_packed)
        }

    def float_params(self) -> Any:
        """The module's own parameters, packed ones dequantized."""

        def unpacked(where: Any, leaf: Any) -> Any:
            layout = self.layouts.get(name_of(where))
            return leaf if layout is None else layout.parameter(leaf.dequantize()).astype(layout.dtype)

        return jax.tree_util.tree_map_with_path(unpacked, self.params, is_leaf=is_packed)

    def tree_flatten(self) -> tuple[Any, Any]:
        """For JAX."""
        rest = (self.blocks, self.tokenizer, self.report)
        return (self.params, self.state), (self.function, tuple(sorted(self.layouts.items())), _Carried(rest))

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "AdaptedModel":
        """For JAX."""
        function, layouts, carried = static
        params, state = arrays
        return cls(function, params, state, dict(layouts), *carried.value)


class _Carried:
    """What goes along with a pytree without telling two apart."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Carried)

    def __hash__(self) -> int:
        return 0


def adapt(
    module: nn.Module | nnx.Module,
    params: Any = None,
    *,
    blocks: str | IsBlock | None = None,
    tokenizer: Any = None,
) -> AdaptedModel:
    """Make a model that `quantize` takes out of any Flax module, which stays as it is.

    What is quantized is found by following each parameter through the traced call to the product it is used in:
    Dense, DenseGeneral, Einsum and Embed.attend of Linen, Linear, LinearGeneral and Einsum of NNX, and any
    layer of one's own that multiplies with a parameter. Whatever else is done with a parameter keeps it float,
    and the report says what it was.

    Args:
        module: a Linen module, or an NNX module, which holds its parameters.
        params: of a Linen module: its parameters, or all its variables, as `init` returns them.
        blocks: what is quantized, one after another, each seeing its quantized predecessors: the name of a list of
            modules ("layers": layers.0, layers.1, ... or layers_0, layers_1, ...) or of one under `scan`; or
            a function of a module's dotted path and the module that says whether it is a block. What is outside
            of blocks stays float. None: the whole model is one block.
        tokenizer: for `perplexity` and `generate` on texts.

    Raises:
        TypeError: `module` is no Flax module.
        ValueError: a Linen module without `params`, an NNX module with them, or `blocks` names nothing.
    """
    function: Any
    if isinstance(module, nn.Module):
        if params is None:
            raise ValueError("params is missing: pass what module.init(...) returned.")
        variables = unfreeze(params if "params" in params else {"params": params})
        function = LinenFunction(module)
        state: Any
        params, state = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    elif isinstance(module, nnx.Module):
        if params is not None:
            raise ValueError("params is for a Linen module: an NNX module holds its own.")
        function, params, state = NnxFunction.of(module)
    else:
        raise TypeError(f"module is {type(module).__name__}: pass a Linen or an NNX module.")
    model = AdaptedModel(function, params, state, {}, blocks, tokenizer)
    block_finder(blocks, model.by_path())
    return model


@dataclass(frozen=True)
class Call:
    """The arguments of a call, arrays apart.

    Attributes:
        static: their structure, and what is no array; hashable.
        arrays: the rest.
    """

    static: tuple[Any, tuple[Any, ...]]
    arrays: list[Any]

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], whose: str) -> "Call":
        """Sort arguments; ValueError naming what `function` misses, or an argument that is neither."""
        try:
            function.check_call(args, kwargs)
        except TypeError as error:
            given = [*(type(arg).__name__ for arg in args), *(f"{name}=" for name in kwargs)]
            raise ValueError(f"{whose} gives {function.name} ({', '.join(given)}), but {error}.") from None
        leaves, structure = jax.tree.flatten((args, dict(kwargs)))
        arrays = [jnp.asarray(leaf) for leaf in leaves if _is_array(leaf)]
        static = tuple(_DYNAMIC if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
        try:
            hash(static)
        except TypeError as error:
            raise ValueError(f"{whose} holds an argument that is neither an array nor hashable: {error}.") from None
        return cls((structure, static), arrays)

    @classmethod
    def from_batch(cls, function: Any, batch: Any, whose: str) -> "Call":
        """A batch of calibration: an array, a tuple of arguments, or a dict of keyword arguments."""
        if isinstance(batch, Mapping):
            return cls.of(function, (), batch, whose)
        return cls.of(function, batch if isinstance(batch, tuple) else (np.asarray(batch),), {}, whose)

    @property
    def signature(self) -> Any:
        """Equal for calls that run the same program."""
        return self.static, tuple((array.shape, str(array.dtype)) for array in self.arrays)


_DYNAMIC = "array"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _arguments(static: tuple[Any, tuple[Any, ...]], arrays: Sequence[Any]) -> tuple[Any, Any]:
    structure, leaves = static
    left = iter(arrays)
    return jax.tree.unflatten(structure, [next(left) if leaf is _DYNAMIC else leaf[1] for leaf in leaves])


@partial(jax.jit, static_argnums=1)
def _run(model: AdaptedModel, static: Any, arrays: list[Any]) -> Any:
    program, out = _trace(model, static, arrays)
    held = {Root(path): hold(leaf, model.layouts.get(path)) for path, leaf in model.by_path().items()}
    given = [*jax.tree.leaves(model.state), *arrays]
    values = {**program.constants, **dict(zip(program.arguments, given, strict=True))}
    evaluate(program.steps, values, held)
    return jax.tree.unflatten(out, results(program, values, held))


def _trace(
    model: AdaptedModel, static: Any, arrays: list[Any], is_block: IsBlock | None = None, *, unroll: bool = False
) -> tuple[Program, Any]:
    """The program of a call with the float parameters, and the structure of what it returns."""
    paths = model.by_path()
    params = jax.tree.structure(model.params, is_leaf=is_packed)
    state, structure = jax.tree.flatten(model.state)

    def call(leaves: dict[str, Any], given: list[Any]) -> Any:
        tree = jax.tree.unflatten(params, [leaves[path] for path in paths])
        args, kwargs = _arguments(static, given[len(state) :])
        return model.function.call(tree, jax.tree.unflatten(structure, given[: len(state)]), args, kwargs, is_block)

    shapes = {path: _float_shape(leaf, model.layouts.get(path)) for path, leaf in paths.items()}
    return trace(call, shapes, [jax.typeof(leaf) for leaf in (*state, *arrays)], unroll=unroll)


def _float_shape(leaf: Any, layout: Layout | None) -> jax.ShapeDtypeStruct:
    """Of a parameter before it was packed."""
    return jax.ShapeDtypeStruct(*((leaf.shape, leaf.dtype) if layout is None else (layout.shape, layout.dtype)))


def name_of(where: Any) -> str:
    """A place in a tree, dotted."""
    return jax.tree_util.keystr(where, simple=True, separator=".")


def block_finder(blocks: str | IsBlock | None, paths: Iterable[str]) -> IsBlock | None:
    """Which modules are blocks, as `adapt` is told.

    Raises:
        ValueError: no parameter lies in a module of that name; the nearest names are given.
    """
    if blocks is None or callable(blocks):
        return blocks
    modules: dict[str, set[str]] = {}  # of parameters: each module, and the modules or parameters in it
    for path in paths:
        names = path.split(".")
        for end in range(1, len(names)):
            modules.setdefault(".".join(names[:end]), set()).add(names[end])
    found = set()
    for path, children in modules.items():
        if re.search(rf"(^|\.){re.escape(blocks)}(_\d+)?$", path):
            numbered = all(child.isdigit() for child in children)
            found |= {f"{path}.{child}" for child in children} if numbered else {path}
    if not found:
        known = sorted({re.sub(r"[._]\d+(?=\.|$)", "", path) for path in modules} | set(modules))
        last = {path.rpartition(".")[2]: path for path in reversed(known)}
        near = [last[name] for name in difflib.get_close_matches(blocks, last, n=3, cutoff=0.4)]
        raise ValueError(
            f"blocks={blocks!r} names no module with parameters: "
            f"did you mean {', '.join(map(repr, near or known[:3]))}?"
        )
    outermost = {path for path in found if not any(path.startswith(f"{other}.") for other in found)}
    return lambda path, module: path in outermost
