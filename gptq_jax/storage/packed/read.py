"""A packed checkpoint as a model's parameters: everything is checked before the first code is read."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptq_jax.models.base import Architecture
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.fields import raise_problems
from gptq_jax.storage.packed.base import ModuleGrid, PackedFormat, Stored, stack_grids
from gptq_jax.storage.packed.detect import PackedCheckpoint
from gptq_jax.storage.parameters import (
    MISFIT,
    Leaf,
    float_problems,
    leaves_of,
    left_over_problems,
    put,
    read_float,
    stored_parts,
)
from gptq_jax.storage.safetensors import STORED_DTYPES, SafetensorsDirectory
from gptq_jax.storage.sharding import Placement, one_device
from gptq_jax.tensor import QuantizedTensor
from pallas_kernels.packing import SUPPORTED_BITS, packed_words

_HEAD = "lm_head"


@dataclass(frozen=True)
class Plan:
    """What is to be read.

    Attributes:
        leaves: the model's parameters.
        structure: of the tree that they fill.
        grids: of the packed modules, by their kernels' paths.
        notes: what is unusual, each a phrase.
    """

    leaves: list[Leaf]
    structure: Any
    grids: dict[str, ModuleGrid]
    notes: list[str]


def read_packed_params(
    checkpoint: PackedCheckpoint, architecture: Architecture, dtype: str = "float32", placement: Placement = one_device
) -> Any:
    """Read a model's parameters, one tensor at a time; packed weights stay packed.

    Args:
        checkpoint: the directory and its format.
        architecture: says which tensor each leaf of the parameter tree is.
        dtype: of the float parameters: float32 or bfloat16.
        placement: where each array goes as soon as it is read.

    Returns:
        The tree of `architecture.abstract_params()`, a QuantizedTensor for each packed module's kernel.

    Raises:
        CheckpointError: naming every module whose tensors do not fit the config or one another.
    """
    source, fmt = checkpoint.source, checkpoint.format
    plan = make_plan(checkpoint, architecture)
    arrays: list[Any] = []
    for leaf in plan.leaves:
        grid = plan.grids.get(leaf.path)
        if grid is None:
            arrays.append(put(read_float(source, leaf, dtype), leaf.path, placement))
            continue
        words = _read_codes(source, fmt, leaf, grid.spec)
        fields = {"codes": words, "scales": grid.scales, "zeros": grid.zeros, "group_of_row": grid.group_of_row}
        placed: dict[str, Any] = {
            name: None if array is None else put(array, f"{leaf.path}.{name}", placement)
            for name, array in fields.items()
        }
        arrays.append(QuantizedTensor(**placed, spec=grid.spec, d_in=leaf.shape[-2]))
    return jax.tree_util.tree_unflatten(plan.structure, arrays)


def describe_packed(checkpoint: PackedCheckpoint, architecture: Architecture) -> tuple[Any, list[str]]:
    """The parameters as shapes, QuantizedTensors of shapes among them, and what is unusual about the checkpoint.

    Scales, zero points and groups are read; codes are not.

    Raises:
        CheckpointError: as `read_packed_params`.
    """
    plan = make_plan(checkpoint, architecture)
    shapes: list[Any] = []
    for leaf in plan.leaves:
        grid = plan.grids.get(leaf.path)
        if grid is None:
            shapes.append(jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
            continue
        *stack, d_in, d_out = leaf.shape
        fields = {"scales": grid.scales, "zeros": grid.zeros, "group_of_row": grid.group_of_row}
        abstract: dict[str, Any] = {
            name: None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)
            for name, array in fields.items()
        }
        abstract["codes"] = jax.ShapeDtypeStruct((*stack, packed_words(d_in, grid.spec.bits), d_out), jnp.uint32)
        shapes.append(QuantizedTensor(**abstract, spec=grid.spec, d_in=d_in))
    return jax.tree_util.tree_unflatten(plan.structure, shapes), plan.notes


def module_of(leaf: Leaf) -> str:
    """The module whose weight a leaf is, by Hugging Face's name."""
    return leaf.tensor.removesuffix(".weight")


def make_plan(checkpoint: PackedCheckpoint, architecture: Architecture) -> Plan:
    """Check every tensor's name, shape and type, then read all but the codes and check their values."""
    source, fmt = checkpoint.source, checkpoint.format
    leaves, structure = leaves_of(source, architecture)
    stored = set(source.names())
    packed: list[Leaf] = []
    floats: list[Leaf] = []
    for leaf in stored_parts(leaves):
        (packed if leaf.is_kernel and _is_packed(stored, leaf, fmt) else floats).append(leaf)
    problems = float_problems(source, floats)
    problems += [
        f"{leaf.tensor} is {source.dtype(leaf.tensor)}, not a float weight ({', '.join(STORED_DTYPES)})"
        for leaf in floats
        if leaf.tensor in stored and source.dtype(leaf.tensor) not in STORED_DTYPES
    ]
    if not packed:
        problems.append(f"{fmt.file} says {fmt.name}, but no module has a tensor {fmt.codes}")
    used = {leaf.tensor for leaf in floats}
    for leaf in packed:
        found, names = _module_problems(source, fmt, leaf)
        problems += found
        used |= names
    dropped = _zero_biases(source, stored - used, packed)
    problems += left_over_problems(source, used | dropped)
    raise_problems(source.path, problems, MISFIT)

    found_grids: dict[str, ModuleGrid] = {}  # by module
    remarks: dict[str, list[str]] = defaultdict(list)
    for leaf in packed:
        module = module_of(leaf)
        try:
            found_grids[module] = _read_grid(source, fmt, leaf)
        except ValueError as error:
            problems.append(f"{module}: {error}")
            continue
        for note in found_grids[module].notes:
            remarks[note].append(module)
    raise_problems(source.path, problems, MISFIT)
    grids, problems = _join(leaves, found_grids)
    raise_problems(source.path, problems, MISFIT)
    if kept := [module_of(leaf) for leaf in floats if leaf.is_kernel and fmt.spec_of(module_of(leaf)) is not None]:
        kept = [module for module in kept if module != _HEAD]
        if kept:
            remarks["stored as float though the config does not leave it so"] += kept
    if dropped:
        remarks["has a bias of zeros, which is left out as the architecture has none"] += sorted(dropped)
    notes = list(fmt.notes)
    if any(module_of(leaf) == _HEAD for leaf in packed):
        notes.append("the output head (lm_head) is quantized")
    notes += [_summary(note, modules) for note, modules in remarks.items()]
    return Plan(leaves, structure, grids, notes)


def _join(leaves: list[Leaf], found: dict[str, ModuleGrid]) -> tuple[dict[str, ModuleGrid], list[str]]:
    """The grids of kernels by path, those of experts stacked, and what keeps experts from being stacked."""
    grids: dict[str, ModuleGrid] = {}
    problems = []
    for leaf in leaves:
        modules = [module_of(part) for part in leaf.parts]
        own = [found[module] for module in modules if module in found]
        if own and len(own) < len(modules):
            lacking = next(module for module in modules if module not in found)
            problems.append(f"{lacking} is float, but other experts of its layer are packed")
        elif own:
            try:
                grids[leaf.path] = stack_grids(own, leaf.shape[-2]) if leaf.stacked else own[0]
            except ValueError as error:
                problems.append(f"{module_of(leaf)}: {error}")
    return grids, problems


def _read_codes(source: SafetensorsDirectory, fmt: PackedFormat, leaf: Leaf, spec: QuantSpec) -> Any:
    """The codes of a kernel as `QuantizedTensor` has them."""
    if not leaf.stacked:
        return fmt.read_codes(source.packed(f"{module_of(leaf)}.{fmt.codes}"), spec, *leaf.shape)
    experts, d_in, d_out = leaf.shape
    stack = np.empty((experts, packed_words(d_in, spec.bits), d_out), np.uint32)
    for place, part in zip(stack, leaf.parts, strict=True):
        place[...] = _read_codes(source, fmt, part, spec)
    return stack


def _is_packed(stored: set[str], leaf: Leaf, fmt: PackedFormat) -> bool:
    """Its codes are there, or some of its tensors in place of a float weight."""
    module = module_of(leaf)
    parts = any(f"{module}.{suffix}" in stored for suffix in fmt.suffixes)
    return f"{module}.{fmt.codes}" in stored or (parts and leaf.tensor not in stored)


def _module_problems(source: SafetensorsDirectory, fmt: PackedFormat, leaf: Leaf) -> tuple[list[str], set[str]]:
    """What is wrong with the names, shapes and types of one packed module, and the tensors that belong to it."""
    module = module_of(leaf)
    stored = set(source.names())
    names = {name for suffix in fmt.suffixes if (name := f"{module}.{suffix}") in stored}
    if leaf.tensor in stored:
        names.add(leaf.tensor)
        return [f"{module} is stored twice, as {fmt.codes} and as a float weight"], names
    spec = fmt.spec_of(module)
    if spec is None:
        return [f"{module} is packed, but {fmt.file} leaves it float"], names
    try:
        layout = fmt.layout(spec, *leaf.shape)
    except ValueError as error:
        return [f"{module} {error}"], names
    problems = []
    for suffix, expected in layout.items():
        name = f"{module}.{suffix}"
        if name not in stored:
            if not expected.optional:
                problems.append(f"{name} is missing")
            continue
        shape, dtype = source.shape(name), source.dtype(name)
        if shape not in expected.shapes:
            other = _other_bits(fmt, spec, leaf, shape) if suffix == fmt.codes else ""
            problems.append(f"{name} has shape {shape}, not {' or '.join(map(str, expected.shapes))}{other}")
        elif dtype not in expected.dtypes:
            problems.append(f"{name} is {dtype}, not {' or '.join(expected.dtypes)}")
    return problems, names


def _other_bits(fmt: PackedFormat, spec: QuantSpec, leaf: Leaf, shape: tuple[int, ...]) -> str:
    """What a wrong shape of codes would be right for."""
    for bits in SUPPORTED_BITS:
        if bits != spec.bits and fmt.name != "awq":
            expected: Stored = fmt.layout(replace(spec, bits=bits), *leaf.shape)[fmt.codes]
            if shape in expected.shapes:
                return f": it is {bits} bits wide, but {fmt.file} says {spec.bits}"
    return ""


def _read_grid(source: SafetensorsDirectory, fmt: PackedFormat, leaf: Leaf) -> ModuleGrid:
    module = module_of(leaf)
    spec = fmt.spec_of(module)
    assert spec is not None  # _module_problems said otherwise
    stored = set(source.names())
    arrays = {
        suffix: source.packed(name)
        for suffix in fmt.suffixes
        if suffix != fmt.codes and (name := f"{module}.{suffix}") in stored
    }
    return fmt.read_grid(arrays, spec, *leaf.shape)


def _zero_biases(source: SafetensorsDirectory, unused: set[str], packed: list[Leaf]) -> set[str]:
    """Biases that old writers stored for every module, zeros where the model has none."""
    names = unused & {f"{module_of(leaf)}.bias" for leaf in packed}
    return {name for name in names if source.dtype(name) in STORED_DTYPES and not np.any(source.tensor(name))}


def _summary(note: str, modules: list[str]) -> str:
    return f"{note}: {modules[0]}" + (f" and {len(modules) - 1} more" if len(modules) > 1 else "")
