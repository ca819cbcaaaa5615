"""What the grid of a weight is, and which weight gets which."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pallas_kernels.packing import SUPPORTED_BITS

SCALE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The integer grid of one weight; hashable, so a static argument of jit.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs (rows of the kernel) that share a scale; -1 for the whole column. The last group may
            be shorter: 576 inputs in groups of 128 are 5 groups.
        symmetric: the zero point is the middle code; otherwise it is stored for each group.
        scale_dtype: what scales are rounded to before codes are chosen. None is the holder's habit: float32
            from a solver called by itself, float16 in a quantized model.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits={self.bits!r} is not supported: use one of {list(SUPPORTED_BITS)}.")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise TypeError(f"group_size={self.group_size!r} is not an integer.")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size} is neither positive nor -1: use e.g. 128, or -1 for whole columns."
            )
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is not supported: use one of {list(SCALE_DTYPES)}.")

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def group_rows(self, d_in: int) -> int:
        """Inputs in a full group of a weight with `d_in` inputs."""
        return d_in if self.group_size == -1 else min(self.group_size, d_in)

    def groups(self, d_in: int) -> int:
        """Groups in a column of `d_in` inputs."""
        return -(-d_in // self.group_rows(d_in))


@dataclass(frozen=True, kw_only=True)
class SpecRules:
    """Layer path -> spec. A path is skipped if any `skip` regex is found in it; else the first override whose
    regex is found in it replaces fields of `default`.
    """

    default: QuantSpec = QuantSpec()
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, tuple[tuple[str, object], ...]], ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.skip, *(pattern for pattern, _ in self.overrides)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from None
        for pattern, fields in self.overrides:
            try:
                replace(self.default, **dict(fields))  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise ValueError(f"override {pattern!r}: {error}") from None

    def spec_for(self, path: str) -> QuantSpec | None:
        """The spec of the layer at `path`, or None where it is skipped."""
        if any(re.search(pattern, path) for pattern in self.skip):
            return None
        return replace(self.default, **self.override_for(path))  # type: ignore[arg-type]

    def override_for(self, path: str) -> dict[str, object]:
        """The fields that the first override found in `path` sets."""
        return next((dict(fields) for pattern, fields in self.overrides if re.search(pattern, path)), {})

    def check_used(self, paths: Iterable[str], kept_float: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise ValueError, naming them all, if a regex is found in none of `paths`.

        Args:
            paths: of the layers.
            kept_float: what is no layer, and why, for the message.
        """
        paths = list(paths)
        unused = [
            pattern
            for pattern in (*self.skip, *(pattern for pattern, _ in self.overrides))
            if not any(re.search(pattern, path) for path in paths)
        ]
        for pattern in unused:
            for path, reason in kept_float.items():
                if re.search(pattern, path):
                    raise ValueError(f"{pattern!r} matches no layer but {path!r}, which stays float: {reason}.")
        if unused:
            raise ValueError(
                f"no layer matches {', '.join(map(repr, unused))}; the layers are named like {_examples(paths)}."
            )


def _examples(paths: Sequence[str]) -> str:
    return ", ".join(repr(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


def parse_override(text: str) -> tuple[str, tuple[tuple[str, object], ...]]:
    """Read `REGEX=bits:3,group_size:64,symmetric:false` into an entry of `SpecRules.overrides`."""
    pattern, separator, settings = text.rpartition("=")
    if not separator or not pattern or not settings:
        raise ValueError(f"override {text!r} is not of the form REGEX=bits:3,group_size:64.")
    fields: dict[str, object] = {}
    for setting in settings.split(","):
        name, _, value = setting.partition(":")
        if name in ("bits", "group_size") and re.fullmatch(r"-?\d+", value):
            fields[name] = int(value)
        elif name == "symmetric" and value in ("true", "false"):
            fields[name] = value == "true"
        else:
            raise ValueError(
                f"override {text!r}: cannot read {setting!r}; use bits:N, group_size:N or symmetric:true|false."
            )
    return pattern, tuple(fields.items())
