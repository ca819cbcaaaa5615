"""Where two trees of plain data differ: what a run that goes on, or a comparison, refuses to mix."""

from typing import Any


def changes(there: Any, here: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, Any]]:
    """Each place where they differ and what is in either, None where nothing is; in the order of the first."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys((*there, *here))
        return [found for key in keys for found in changes(there.get(key), here.get(key), (*path, key))]
    return [] if there == here else [(path, there, here)]
