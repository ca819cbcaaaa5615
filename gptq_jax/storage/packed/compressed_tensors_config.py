"""The config of compressed-tensors checkpoints: groups of modules, each with a grid, and modules left alone."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gptq_jax.spec import QuantSpec
from gptq_jax.storage.fields import Fields, shown
from gptq_jax.storage.packed import compressed_tensors
from gptq_jax.storage.packed.base import PackedFormat
from pallas_kernels.packing import SUPPORTED_BITS

FORMAT = "pack-quantized"
_CLASS = "Linear"  # of every module here
_LONGEST_REGEX = 1000
Target = Callable[[str], int]  # module -> how closely it is named: 0 not at all, 1 by class, 2 by regex, 3 by name


def parse(config: Mapping[str, Any], file: Path, where: str = "") -> PackedFormat:
    """Read `quantization_config` (or `compression_config`) of config.json.

    Args:
        config: the object.
        file: it comes from, for errors.
        where: what stands before its fields' names in errors.

    Raises:
        CheckpointError: naming every field that has a value this library cannot read.
    """
    fields = Fields(file, config, where)
    version = fields.get("format", kind=str, default=FORMAT)
    if version not in (FORMAT, "mixed-precision"):
        fields.problem("format", f"is {shown(version)}: of its formats, {FORMAT} is supported")
    status = fields.get("quantization_status", kind=str, default="compressed")
    if status != "compressed":
        fields.problem("quantization_status", f"is {shown(status)}, not 'compressed': weights are not packed")
    for name in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if fields.get(name, kind=dict):
            fields.problem(name, "is given: not supported")
    if fields.nested("sparsity_config").get("format", kind=str, default="dense") != "dense":
        fields.problem("sparsity_config", "is not dense: sparse weights are not supported")
    ignored = _targets(fields, "ignore")
    groups = fields.nested("config_groups")
    rules = []
    for name in groups.content:
        group = groups.nested(name)
        rules.append((tuple(_targets(group, "targets")), _spec(group)))
    if not rules and not fields.problems:
        groups.problem("", "is empty: nothing says which grid the weights have")
    fields.check()
    return PackedFormat(
        name="compressed-tensors",
        version=FORMAT,
        file=file.name,
        codes=compressed_tensors.CODES,
        suffixes=compressed_tensors.SUFFIXES,
        spec_of=partial(_spec_of, tuple(ignored), tuple(rules)),
        layout=compressed_tensors.layout,
        read_grid=compressed_tensors.read_grid,
        read_codes=compressed_tensors.read_codes,
        notes=(f"{len(rules)} groups of modules with grids of their own",) if len(rules) > 1 else (),
    )


def _spec(group: Fields) -> QuantSpec | None:
    """The grid of one entry of config_groups; None, and a problem noted, where it has none."""
    found = len(group.problems)
    if (packing := group.get("format", kind=str, default=FORMAT)) != FORMAT:
        group.problem("format", f"is {shown(packing)}: of its formats, {FORMAT} is supported")
    for name in ("input_activations", "output_activations"):
        if group.get(name, kind=dict):
            group.problem(name, "is given: quantized activations are not supported")
    weights = group.nested("weights")
    bits = weights.get("num_bits", kind=int, default=8)
    if bits not in SUPPORTED_BITS:
        weights.problem("num_bits", f"is {bits}: {', '.join(map(str, SUPPORTED_BITS))} are supported")
    if (kind := weights.get("type", kind=str, default="int")) != "int":
        weights.problem("type", f"is {shown(kind)}: only int is supported")
    if weights.content.get("dynamic"):
        weights.problem("dynamic", "is true: weights have static scales")
    size = weights.get("group_size", kind=int)
    strategy = weights.get("strategy", kind=str, default="channel" if size in (None, -1) else "group")
    if strategy == "channel":
        size = -1
    elif strategy != "group":
        weights.problem("strategy", f"is {shown(strategy)}: group and channel are supported")
    elif size is None or not 0 < size < 2**31:
        weights.problem("group_size", f"is {size}, not positive")
    symmetric = weights.get("symmetric", kind=bool, default=True)
    if len(group.problems) > found or size is None:
        return None
    return QuantSpec(bits=bits, group_size=size, symmetric=symmetric)


def _targets(fields: Fields, name: str) -> list[Target]:
    """Names, classes and, after "re:", regexes."""
    targets: list[Target] = []
    for text in fields.get(name, kind=list, default=[]):
        if not isinstance(text, str):
            fields.problem(name, f"holds {shown(text)}, which is no name")
        elif not text.startswith("re:"):
            targets.append(partial(_named, text))
        else:
            try:
                if len(text) > _LONGEST_REGEX:
                    raise ValueError(f"longer than {_LONGEST_REGEX} characters")
                targets.append(partial(_matched, re.compile(text[3:])))
            except (re.error, ValueError, RecursionError, OverflowError) as error:
                fields.problem(name, f"holds {shown(text)}, which is no regular expression: {error}")
    return targets


def _named(text: str, module: str) -> int:
    return 3 if text == module else int(text == _CLASS)


def _matched(regex: re.Pattern[str], module: str) -> int:
    return 2 if regex.match(module) else 0


def _spec_of(
    ignored: tuple[Target, ...], rules: tuple[tuple[tuple[Target, ...], QuantSpec | None], ...], module: str
) -> QuantSpec | None:
    if any(target(module) for target in ignored):
        return None
    close = [(max((target(module) for target in targets), default=0), spec) for targets, spec in rules]
    best = max(close, key=lambda found: found[0])
    return best[1] if best[0] else None
