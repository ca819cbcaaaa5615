"""AWQ's `gemm` layout, as AutoAWQ and GPTQModel write it: 4 bits, packed along the outputs, read only.

A word holds 8 neighbouring outputs of one input, in the order 0, 2, 4, 6, 1, 3, 5, 7; zero points likewise. They
are true zero points. The codes are packed anew along the inputs, exactly.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from gptq_jax.spec import QuantSpec
from gptq_jax.storage.fields import Fields, shown
from gptq_jax.storage.packed.base import (
    SCALE_DTYPES,
    WORD_DTYPES,
    Arrays,
    ModuleGrid,
    PackedFormat,
    Stored,
    module_grid,
)
from gptq_jax.storage.packed.words import pack_words

# The output, of each 8, that field k of a word holds.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4
_ROWS = 1024  # unpacked at a time


def parse(config: Mapping[str, Any], file: Path, where: str = "") -> PackedFormat:
    """Read a config: `quantization_config` of config.json, or all of quant_config.json.

    Raises:
        CheckpointError: naming every field that has a value this library cannot read.
    """
    fields = Fields(file, config, where)
    version = fields.get("version", "checkpoint_format", "format", kind=str, default="gemm").lower()
    if version != "gemm":
        fields.problem("version", f"is {shown(version)}: of AWQ's layouts, gemm is supported")
    if (bits := fields.get("bits", "w_bit", kind=int, default=_BITS)) != _BITS:
        fields.problem("bits", f"is {bits}: AWQ has {_BITS}")
    size = fields.get("group_size", "q_group_size", kind=int, default=128)
    if size != -1 and not 0 < size < 2**31:
        fields.problem("group_size", f"is {size}, neither positive nor -1")
    fields.get("zero_point", kind=bool)
    kept = fields.get("modules_to_not_convert", kind=list, default=[])
    if not all(isinstance(name, str) for name in kept):
        fields.problem("modules_to_not_convert", "is no list of names")
    fields.check()
    # Zero points are always stored, so the data says whether they are all in the middle.
    spec = QuantSpec(bits=_BITS, group_size=size, symmetric=config.get("zero_point") is False)
    return PackedFormat(
        name="awq",
        version=version,
        file=file.name,
        codes="qweight",
        suffixes=("qweight", "qzeros", "scales"),
        spec_of=partial(_spec_of, tuple(kept), spec),
        layout=layout,
        read_grid=read_grid,
        read_codes=read_codes,
    )


def layout(spec: QuantSpec, d_in: int, d_out: int) -> dict[str, Stored]:
    """The tensors of a module; ValueError if its outputs do not fill words."""
    if d_out % len(ORDER):
        raise ValueError(f"has {d_out} outputs, but AWQ packs {len(ORDER)} at a time")
    groups = spec.groups(d_in)
    return {
        "qweight": Stored(shapes=((d_in, d_out // len(ORDER)),), dtypes=WORD_DTYPES),
        "qzeros": Stored(shapes=((groups, d_out // len(ORDER)),), dtypes=WORD_DTYPES),
        "scales": Stored(shapes=((groups, d_out),), dtypes=SCALE_DTYPES),
    }


def read_grid(arrays: Arrays, spec: QuantSpec, d_in: int, d_out: int) -> ModuleGrid:
    """Scales and zero points of one module; ValueError if scales are not finite."""
    zeros = _unpack(arrays["qzeros"].view(np.uint32))
    return module_grid(spec, d_in, scales=arrays["scales"], zeros=zeros)


def read_codes(
    stored: Shaped[np.ndarray, "d_in d_out_words"], spec: QuantSpec, d_in: int, d_out: int
) -> UInt32[np.ndarray, "words d_out"]:
    """`qweight` packed along the inputs."""
    words = stored.view(np.uint32)
    # A multiple of 8 rows fills whole words, so parts follow one another.
    parts = [pack_words(_unpack(words[start : start + _ROWS]), _BITS) for start in range(0, d_in, _ROWS)]
    return np.concatenate(parts)


def _unpack(words: UInt32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows d_out"]:
    codes = np.empty((*words.shape, len(ORDER)), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, :, output] = (words >> np.uint32(_BITS * place)) & np.uint32(2**_BITS - 1)
    return codes.reshape(len(words), -1)


def _spec_of(kept: tuple[str, ...], spec: QuantSpec, module: str) -> QuantSpec | None:
    return None if any(name in module for name in kept) else spec
