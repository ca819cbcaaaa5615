"""The config of Hugging Face GPTQ checkpoints, in every spelling its writers have used."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptq_jax.spec import QuantSpec
from gptq_jax.storage.fields import Fields, shown
from gptq_jax.storage.packed import gptq
from gptq_jax.storage.packed.base import PackedFormat
from pallas_kernels.packing import SUPPORTED_BITS

Rule = tuple[re.Pattern[str], QuantSpec | None]
_LONGEST_REGEX = 1000
_LABELS = {"gptq": "1 (gptq)", "gptq_v2": "2 (gptq_v2)", "gptq_p": "2 in bit planes (gptq_p)"}


def parse(config: Mapping[str, Any], file: Path, where: str = "") -> PackedFormat:
    """Read a config: `quantization_config` of config.json, or all of quantize_config.json.

    Args:
        config: the object.
        file: it comes from, for errors.
        where: what stands before its fields' names in errors.

    Raises:
        CheckpointError: naming every field that has a value this library cannot read.
    """
    fields = Fields(file, config, where)
    version = _version(fields)
    spec = _spec(fields, None)
    if (packing := fields.get("pack_dtype", kind=str, default="int32")) != "int32":
        fields.problem("pack_dtype", f"is {shown(packing)}: only int32 is supported")
    if fields.get("is_marlin_format", kind=bool, default=False):
        fields.problem("is_marlin_format", "is true: Marlin's layout is not supported, convert it to gptq_v2")
    fields.get("desc_act", kind=bool)  # g_idx says what it did; only its type is checked
    rules = _dynamic(fields, spec)
    fields.check()
    assert spec is not None  # otherwise check raised
    notes = []
    if rules:
        skipped = sum(rule is None for _, rule in rules)
        notes.append(f"dynamic has {len(rules)} patterns for single modules, {skipped} of which leave them float")
    if version == "gptq" and not spec.symmetric and not _recent(config):
        notes.append("asymmetric in gptq v1 by an unknown or old writer: zero points may be off by one")
    if config.get("lm_head"):
        notes.append("the output head is quantized by the config")
    return PackedFormat(
        name="gptq",
        version=_LABELS[version],
        file=file.name,
        codes=gptq.CODES,
        suffixes=gptq.SUFFIXES,
        spec_of=partial(_spec_of, tuple(rules), spec),
        layout=gptq.layout,
        read_grid=partial(gptq.read_grid, version=version),
        read_codes=partial(gptq.read_codes, version=version),
        notes=tuple(notes),
    )


def _version(fields: Fields) -> str:
    """checkpoint_format; GPTQModel repeats it as format, and a file without either is v1."""
    version = fields.get("checkpoint_format", "format", kind=str, default="gptq")
    if version not in gptq.VERSIONS:
        fields.problem(
            "checkpoint_format" if fields.content.get("checkpoint_format") is not None else "format",
            f"is {shown(version)}, which cannot be read: {', '.join(gptq.VERSIONS)} can",
        )
    return version


def _spec(fields: Fields, default: QuantSpec | None) -> QuantSpec | None:
    """The grid that fields give; None, and a problem noted, where they give none."""
    bits = fields.get("bits", "w_bit", "wbits", kind=int, default=default.bits if default else None)
    size = fields.get("group_size", "q_group_size", kind=int, default=default.group_size if default else None)
    symmetric = fields.get("sym", kind=bool)
    if symmetric is None:
        zero_point = fields.get("zero_point", kind=bool)
        symmetric = (default.symmetric if default else True) if zero_point is None else not zero_point
    found = len(fields.problems)
    if bits is None:
        fields.problem("bits", "is missing")
    elif bits not in SUPPORTED_BITS:
        fields.problem("bits", f"is {bits}: {', '.join(map(str, SUPPORTED_BITS))} are supported")
    if size is None:
        fields.problem("group_size", "is missing")
    elif size != -1 and not 0 < size < 2**31:
        fields.problem("group_size", f"is {size}, neither positive nor -1")
    if len(fields.problems) > found or bits is None or size is None:
        return None
    return QuantSpec(bits=bits, group_size=size, symmetric=symmetric)


def _dynamic(fields: Fields, default: QuantSpec | None) -> list[Rule]:
    """Ordered rules; "-:" leaves a module float, "+:" or nothing overrides fields of its grid."""
    patterns = fields.nested("dynamic")
    rules: list[Rule] = []
    for text in patterns.content:
        sign, pattern = (text[:2], text[2:]) if text[:2] in ("-:", "+:") else ("+:", text)
        try:
            if len(pattern) > _LONGEST_REGEX:
                raise ValueError(f"longer than {_LONGEST_REGEX} characters")
            regex = re.compile(pattern)
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            patterns.problem(shown(text), f"is no regular expression: {error}")
            continue
        if sign == "-:":
            rules.append((regex, None))
        else:
            rules.append((regex, _spec(patterns.nested(text), default)))
    return rules


def _spec_of(rules: tuple[Rule, ...], default: QuantSpec, module: str) -> QuantSpec | None:
    return next((spec for regex, spec in rules if regex.match(module)), default)


def _recent(config: Mapping[str, Any]) -> bool:
    """Whether GPTQModel 0.9 or later wrote it, which stores asymmetric v1 right."""
    meta = config.get("meta")
    written_by = meta.get("quantizer") if isinstance(meta, dict) else None
    for writer in written_by if isinstance(written_by, list) else [written_by]:
        found = re.match(r"gptqmodel:(\d+)\.(\d+)", str(writer))
        if found and (int(found[1]), int(found[2])) >= (0, 9):
            return True
    return False
