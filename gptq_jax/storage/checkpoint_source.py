"""A float checkpoint as a model whose blocks are read from disk each time they are asked for, and kept nowhere."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from gptq_jax.hooks.nnx import Params
from gptq_jax.models.base import Architecture, Model, calibrate
from gptq_jax.models.identity import digest_json
from gptq_jax.models.quantizable import Calibration
from gptq_jax.storage.base import CheckpointError, TensorSource
from gptq_jax.storage.load import checked_leaves, dtype_name, open_source, read_architecture, read_arrays
from gptq_jax.storage.manifest import digest
from gptq_jax.storage.packed.detect import PACKED_KEYS, packed_format
from gptq_jax.storage.parameters import Leaf, finite_tensor, stored_parts
from gptq_jax.storage.sharding import Placement, one_device
from gptq_jax.storage.store import is_store

PACKED = "holds packed weights, which are quantized already: open the float checkpoint that they were made from."
STORE = "was written by save: load it, a model in memory is quantized block by block too."


class CheckpointSource:
    """What `quantize_blocks` and `StoreSink` take in place of a `Model`; see `open_checkpoint`.

    Every tensor is read once when it is made: none may be missing, misshapen or not finite.

    Args:
        checkpoint: the float tensors.
        dtype: of the parameters: float32 or bfloat16.
        placement: where each array goes as soon as it is read.
        on_tensor: called after each tensor that is checked, with how many are done and how many there are.

    Raises:
        CheckpointError: what is there does not fit its config, or is damaged.

    Attributes:
        config: the architecture.
        source: the checkpoint's own config (Hugging Face names).
        tokenizer: a transformers fast tokenizer, or None.
        dtype: see there.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        dtype: DTypeLike = "float32",
        placement: Placement = one_device,
        on_tensor: Callable[[int, int], None] | None = None,
    ) -> None:
        self.dtype, self.placement = dtype_name(dtype), placement
        self.config: Architecture = read_architecture(checkpoint)
        if packed_format(checkpoint) is not None:
            raise CheckpointError(checkpoint.path, PACKED)
        self.source = {key: value for key, value in checkpoint.config.items() if key not in PACKED_KEYS}
        self.tokenizer = checkpoint.tokenizer()
        self._checkpoint = checkpoint
        leaves, _ = checked_leaves(checkpoint, self.config)
        self._parts: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            first, index, *_ = leaf.path.split(".")
            self._parts.setdefault(f"{first}.{index}" if first == "layers" else first, []).append(leaf)
        self._weights = _digest_of_tensors(checkpoint, leaves, on_tensor)

    @property
    def params(self) -> Mapping[str, Any]:
        """As `Model.params`, but "embed", "head" and each of "layers" are read when they are asked for."""
        return _Parts(self)

    def calibration(self, calls: Sequence[Any], masks: Sequence[Any]) -> Calibration:
        """As `Model.calibration`; blocks are read each time, and `assemble` makes a model in memory."""
        return calibrate(
            self.config,
            calls,
            masks,
            embedding=lambda: self.read("embed"),
            block=lambda index: self.read(f"layers.{index}"),
            heading=lambda: self.read("head"),
            assemble=lambda packed, report: Model(
                self.config,
                {"embed": self.read("embed"), "layers": list(packed), "head": self.read("head")},
                self.tokenizer,
                self.source,
                report,
            ),
        )

    def identity(self) -> dict[str, str]:
        """SHA-256 of its weights, config and tokenizer, and the dtype they are read in."""
        return {
            "weights": self._weights,
            "config": digest_json(self.source),
            **self._tokenizer_digest,
            "dtype": self.dtype,
        }

    def read(self, part: str) -> Params:
        """The parameters "embed", "layers.N" or "head"."""
        tree: Any = self.config.abstract_params()
        for key in part.split("."):
            tree = tree[int(key) if key.isdecimal() else key]
        arrays = read_arrays(self._checkpoint, self._parts.get(part, []), self.dtype, self.placement)
        return jax.tree.unflatten(jax.tree.structure(tree), arrays)

    @cached_property
    def _tokenizer_digest(self) -> dict[str, str]:
        if self.tokenizer is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
            return {"tokenizer": digest_json({file.name: digest(file) for file in files})}


class _Parts(Mapping[str, Any]):
    """`CheckpointSource.params`."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Any:
        if name == "layers":
            return _Layers(self._source)
        if name not in ("embed", "head"):
            raise KeyError(name)
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("embed", "layers", "head"))

    def __len__(self) -> int:
        return 3


class _Layers(Sequence[Params]):
    def __init__(self, source: CheckpointSource) -> None:
        self._source = source

    def __getitem__(self, index: Any) -> Any:
        return self._source.read(f"layers.{range(len(self))[index]}")

    def __len__(self) -> int:
        return self._source.config.num_layers


def open_checkpoint(
    path_or_id: str | PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    arch_config: str | PathLike[str] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> CheckpointSource:
    """A float model to quantize that need not fit into memory: `quantize_blocks(open_checkpoint(path), ...)`.

    Its tensors are read once now, one at a time, and checked; then block by block as they are needed.

    Args:
        path_or_id, dtype, arch_config: as for `load`; but no directory that `save` wrote.
        on_tensor: called after each tensor that is checked, with how many are done and how many there are.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: it is damaged, does not fit its config, or is quantized already.
        ValueError: its architecture or `dtype` is not supported.
    """
    if is_store(Path(path_or_id)) and arch_config is None:
        raise CheckpointError(path_or_id, STORE)
    return CheckpointSource(open_source(path_or_id, arch_config), dtype, on_tensor=on_tensor)


def _digest_of_tensors(
    checkpoint: TensorSource, leaves: Sequence[Leaf], on_tensor: Callable[[int, int], None] | None
) -> str:
    """SHA-256 of all tensors with their names, of which one is in memory at a time; CheckpointError if not finite."""
    whole, parts = hashlib.sha256(), list(stored_parts(leaves))
    for done, part in enumerate(parts, 1):
        values = np.ascontiguousarray(finite_tensor(checkpoint, part.tensor))
        whole.update(f"{part.tensor} {values.dtype} {values.shape}\n".encode())
        whole.update(hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest())
        if on_tensor is not None:
            on_tensor(done, len(parts))
    return whole.hexdigest()
