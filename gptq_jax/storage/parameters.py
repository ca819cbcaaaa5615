"""Which stored tensor each parameter of a model is, whether all fit, and the float ones as arrays."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gptq_jax.models.base import Architecture
from gptq_jax.models.experts import EXPERT
from gptq_jax.parallel.data import place
from gptq_jax.storage.base import BFLOAT16, CheckpointError, TensorSource
from gptq_jax.storage.sharding import Placement

# Constants that old checkpoints store although the model computes them: frequencies, and causal masks.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
OUTPUTS = ("lm_head.weight", "embed_out.weight")
# What checkpoints write before their names in place of the first part of ours: nothing, where the model was saved
# without its head; the path of the language model, where it is one of several.
BASES = ("", "language_model.model.", "model.language_model.")
OTHER_MODELS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
MISFIT = "does not fit its config: "
_CHUNK = 2**22  # numbers looked at together


@dataclass(frozen=True)
class Leaf:
    """One parameter of a model.

    Attributes:
        path: in the tree, like "layers.3.mlp.down_proj.kernel".
        tensor: Hugging Face's name of it; with `EXPERT` in it, that of a tensor for each expert.
        transposed: the tensor is stored as [d_out, d_in].
        shape: of the parameter.
    """

    path: str
    tensor: str
    transposed: bool
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether it is made of a tensor for each expert."""
        return EXPERT in self.tensor

    @property
    def parts(self) -> "tuple[Leaf, ...]":
        """What is stored as one tensor each: the leaf itself, or that of every expert."""
        if not self.stacked:
            return (self,)
        names = (self.tensor.replace(EXPERT, str(expert)) for expert in range(self.shape[0]))
        return tuple(replace(self, tensor=name, shape=self.shape[1:]) for name in names)

    @property
    def is_kernel(self) -> bool:
        """Whether it is the weight of a linear layer."""
        return self.path.endswith(".kernel")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the float tensor."""
        return self.shape[::-1] if self.transposed else self.shape


def leaves_of(source: TensorSource, architecture: Architecture) -> tuple[list[Leaf], Any]:
    """The parameters in the order of the tree, and the structure that they fill.

    Raises:
        CheckpointError: the config names more layers, or more experts, than the checkpoint has tensors.
    """
    stored = len(source.names())
    if architecture.num_layers > stored:  # before so many shapes are made
        raise CheckpointError(
            source.path, f"{MISFIT}num_hidden_layers is {architecture.num_layers}, but there are {stored} tensors."
        )
    leaves, structure = _leaves(architecture)
    if (experts := max((leaf.shape[0] for leaf in leaves if leaf.stacked), default=0)) > stored:
        raise CheckpointError(source.path, f"{MISFIT}it has {experts} experts, but there are {stored} tensors.")
    names = _stored_names(leaves, set(source.names()))
    return [replace(leaf, tensor=name) for leaf, name in zip(leaves, names, strict=True)], structure


def _stored_names(leaves: Sequence[Leaf], stored: set[str]) -> list[str]:
    """What the checkpoint calls each tensor: as we do, or with another base before the name of every block."""
    ours = [leaf.tensor for leaf in leaves]
    base = ours[0].split(".")[0] + "."
    if not any(name.startswith(base) and name in stored for name in ours):
        for other in BASES:
            renamed = [other + name.removeprefix(base) if name.startswith(base) else name for name in ours]
            if renamed[0] in stored:
                return renamed
    return ours


def stored_parts(leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    """Leaves as they are stored, those of experts apart."""
    return (part for leaf in leaves for part in leaf.parts)


def float_problems(source: TensorSource, leaves: Iterable[Leaf]) -> list[str]:
    """What keeps float tensors from being these parameters, each a phrase."""
    stored, problems = set(source.names()), []
    for leaf in stored_parts(leaves):
        if leaf.tensor not in stored:
            problems.append(f"{leaf.tensor} is missing")
        elif source.shape(leaf.tensor) != leaf.stored_shape:
            problems.append(f"{leaf.tensor} has shape {source.shape(leaf.tensor)}, not {leaf.stored_shape}")
    return problems


def left_over_problems(source: TensorSource, used: set[str]) -> list[str]:
    """The tensors that nothing uses, each a phrase."""
    problems = []
    stored = set(source.names())
    left_over = sorted(name for name in stored - used if not COMPUTED.search(name) and not OTHER_MODELS.search(name))
    for output in sorted(set(OUTPUTS) & set(left_over)):
        # The config ties the head to the embedding: a stored copy may be dropped, another matrix may not.
        alike = sorted(name for name in used if name in stored and source.shape(name) == source.shape(output))
        if alike:
            left_over.remove(output)
            if not any(_equal(source, output, name) for name in alike):
                problems.append(f"{output} differs from {alike[0]} though the config ties them")
    return problems + [f"{name} belongs to no part of this architecture" for name in left_over]


def read_float(source: TensorSource, leaf: Leaf, dtype: str) -> Float[np.ndarray, "..."]:
    """One float parameter; CheckpointError if it is not finite."""
    if leaf.stacked:
        stack = np.empty(leaf.shape, jnp.dtype(dtype))
        for place, part in zip(stack, leaf.parts, strict=True):
            place[...] = read_float(source, part, dtype)
        return stack
    values = finite_tensor(source, leaf.tensor)
    return np.ascontiguousarray(values.T if leaf.transposed else values, dtype=jnp.dtype(dtype))


def finite_tensor(source: TensorSource, name: str) -> Float[np.ndarray, "..."]:
    """One tensor as stored; CheckpointError if it holds NaN or infinity."""
    values = source.tensor(name)
    if not _all_finite(values):
        raise CheckpointError(source.path, f"tensor {name!r} holds NaN or infinity.")
    return values


def _all_finite(values: Shaped[np.ndarray, "..."]) -> bool:
    flat = values.ravel(order="K")  # no copy of a transposed view
    chunks = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    if values.dtype == BFLOAT16:  # numpy takes ten times as long over a type that is not its own
        return all(bool(np.all(chunk.view(np.uint16) & 0x7F80 != 0x7F80)) for chunk in chunks)
    return all(bool(np.isfinite(chunk).all()) for chunk in chunks)


def put(array: Shaped[np.ndarray, "..."], name: str, placement: Placement) -> Shaped[Array, "..."]:
    """The array on the devices that `placement` gives it by its name in the tree; each is sent its part only."""
    sharding = placement(name, array.shape)
    if len(sharding.device_set) == 1:
        return jax.device_put(array, sharding)
    return place(array, sharding)


@lru_cache(maxsize=8)
def _leaves(architecture: Architecture) -> tuple[tuple[Leaf, ...], Any]:
    found, structure = jax.tree_util.tree_flatten_with_path(architecture.abstract_params())
    leaves = []
    for keys, leaf in found:
        tensor, transposed = architecture.tensor_name(tuple(map(_key, keys)))
        leaves.append(Leaf(jax.tree_util.keystr(keys, simple=True, separator="."), tensor, transposed, leaf.shape))
    return tuple(leaves), structure


def _key(entry: Any) -> str | int:
    return entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key


def _equal(source: TensorSource, one: str, other: str) -> bool:
    return source.shape(one) == source.shape(other) and np.array_equal(source.tensor(one), source.tensor(other))
