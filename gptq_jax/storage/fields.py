"""Typed access to the JSON objects of foreign checkpoints; all that is wrong is raised at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_jax.storage.base import CheckpointError

_KINDS = {int: "an integer", bool: "true or false", str: "a string", dict: "an object", list: "a list"}
_SHOWN = 8  # problems in one message


class Fields:
    """Reads fields of an object and collects what is wrong with them.

    Attributes:
        file: that the object is in, for errors.
        content: the object.
        where: what stands before a field's name in errors, like "quantization_config.".
        problems: phrases that name a field; shared by the readers of nested objects.
    """

    def __init__(
        self, file: Path, content: Mapping[str, Any], where: str = "", problems: list[str] | None = None
    ) -> None:
        self.file, self.content, self.where = file, content, where
        self.problems: list[str] = [] if problems is None else problems

    def get(self, *names: str, kind: type, default: Any = None) -> Any:
        """The first of `names` that is present and not null, or `default`; of another type it is a problem."""
        name = next((name for name in names if self.content.get(name) is not None), None)
        if name is None:
            return default
        value = self.content[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.problem(name, f"is {shown(value)}, not {_KINDS[kind]}")
            return default
        return value

    def nested(self, name: str) -> "Fields":
        """A reader of the object under `name`; an empty one if there is none."""
        return Fields(self.file, self.get(name, kind=dict, default={}), f"{self.where}{name}.", self.problems)

    def problem(self, name: str, text: str) -> None:
        """Note what is wrong with one field."""
        self.problems.append(f"{self.where}{name} {text}")

    def check(self) -> None:
        """Raise CheckpointError with every problem found."""
        raise_problems(self.file, self.problems)


def raise_problems(path: Path, problems: list[str], before: str = "") -> None:
    """Raise one CheckpointError that names the first of `problems`, if there are any."""
    if problems:
        text = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(path, f"{before}{text}{more}.")


def shown(value: Any, length: int = 60) -> str:
    """A value as it is shown in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
