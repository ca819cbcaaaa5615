"""GGUF files: llama.cpp's single-file checkpoints, dequantized tensor by tensor."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from gptq_jax.storage.base import BFLOAT16, CheckpointError
from gptq_jax.storage.gguf_config import ROPE_FACTORS, family_of, gguf_config
from gptq_jax.storage.gguf_families import BLOCK, OUTER
from gptq_jax.storage.gguf_header import TensorInfo, read_header

FLOAT_TYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}
BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


class GgufFile:
    """A `TensorSource` over one GGUF file of a family in `GGUF_FAMILIES`.

    F32, F16 and BF16 tensors come as stored; Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K as float32.

    Raises:
        CheckpointError: the file is damaged, its architecture is not supported, or a tensor has another type.
    """

    format = "GGUF"

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = self.config_file = Path(path)
        if self.path.stat().st_size == 0:
            raise CheckpointError(self.path, "is empty.")
        header = read_header(self.path, np.memmap(self.path, mode="r"))
        for name, info in header.tensors.items():
            _check_type(self.path, name, info)
        self._metadata = header.metadata
        self._family = family_of(self.path, header)
        factors = {name: self._read(header.tensors[name]) for name in ROPE_FACTORS if name in header.tensors}
        self.config: dict[str, Any] = gguf_config(self.path, header, factors)
        self._tensors = {
            hf_name(name, self._family.blocks): info for name, info in header.tensors.items() if name not in factors
        }

    def names(self) -> list[str]:
        """Every tensor; one whose GGUF name has no counterpart keeps it."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return self._tensors[name].shape

    def tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor, dequantized; values and the order of rows as Hugging Face has them."""
        values = self._read(self._tensors[name])
        if name.endswith("norm.weight") and self._family.norm_offset:
            return values - np.asarray(self._family.norm_offset, values.dtype)
        if not self._family.permuted:
            return values
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{projection}." in name:
                if values.shape[0] % (2 * self.config[heads]):
                    raise CheckpointError(
                        self.path,
                        f"{name}: {values.shape[0]} rows are not pairs for {self.config[heads]} heads.",
                    )
                return half_rotation_order(values, self.config[heads])
        return values

    def tokenizer(self) -> Any | None:
        """The tokenizer the metadata describes."""
        from gptq_jax.storage.tokenizer import gguf_tokenizer

        return gguf_tokenizer(self.path, self._metadata, context_length=self.config["max_position_embeddings"])

    def _read(self, info: TensorInfo) -> Shaped[np.ndarray, "..."]:
        # Read, not mapped: the pages of a map that stays open count as this process's own.
        raw = np.fromfile(self.path, np.uint8, info.nbytes, offset=info.start)
        if raw.size != info.nbytes:
            raise CheckpointError(self.path, "is cut off: the file was changed while it was read.")
        if info.type.name in FLOAT_TYPES:
            return raw.view(FLOAT_TYPES[info.type.name]).reshape(info.shape)
        from gguf.quants import dequantize

        # Damaged scales become NaN or infinity, which the reader of the parameters reports.
        with np.errstate(all="ignore"):
            return np.asarray(dequantize(raw.reshape(-1, info.row_bytes), info.type)).reshape(info.shape)


def hf_name(name: str, blocks: Mapping[str, str] = BLOCK) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        index, part, kind = found.groups()
        return f"model.layers.{index}.{blocks[part]}.{kind}" if part in blocks else name
    part, _, kind = name.rpartition(".")
    return f"{OUTER[part]}.{kind}" if part in OUTER else name


def half_rotation_order(values: Float[np.ndarray, "rows *d_in"], heads: int) -> Float[np.ndarray, "rows *d_in"]:
    """Undo llama.cpp's reordering of query and key rows (or biases).

    GGUF keeps the two members of a rotary pair next to each other in a head; Hugging Face keeps them half a
    head apart (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py is the inverse).
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check_type(path: Path, name: str, info: TensorInfo) -> None:
    if info.type.name not in FLOAT_TYPES and info.type.name not in BLOCK_TYPES:
        raise CheckpointError(
            path,
            f"tensor {name!r} is {info.type.name}, which cannot be read; "
            f"{', '.join((*FLOAT_TYPES, *BLOCK_TYPES))} can.",
        )
