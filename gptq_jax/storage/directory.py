"""Directories that appear under their name only when all of them is on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE_MARK, EXPORT_MARK = "gptq_jax.json", "gptq_jax_export.json"  # what tells our directories from anybody else's
MARGIN = 64 * 2**20  # free bytes wanted beyond the content itself


def check_target(path: str | os.PathLike[str], *, overwrite: bool, nbytes: int = 0) -> None:
    """Raise, before any work, if a directory of `nbytes` cannot be written to `path`.

    Raises:
        FileExistsError: something is there and `overwrite` is false, or it is no directory of this library's.
        FileNotFoundError: the parent directory does not exist.
        OSError: too little free space.
    """
    path = Path(path).absolute()
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists: pass --overwrite (overwrite=True) to replace it.")
        if not (path.is_dir() and (_is_ours(path) or not any(path.iterdir()))):
            raise FileExistsError(f"{path} was not written by gptq-jax, and is not replaced: choose another place.")
    check_parent(path, nbytes)


def check_parent(path: Path, nbytes: int = 0) -> None:
    """Raise OSError unless something of `nbytes` can be written beside `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist: create it, or choose another place.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable: choose another place.")
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + MARGIN:
        raise OSError(f"{path.parent} has {free / 2**20:.0f} MiB free, but {(nbytes + MARGIN) / 2**20:.0f} are needed.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` at the end, and leaves nothing behind if that is not reached."""
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    replaced = partial.with_suffix(".replaced")
    try:
        os.chmod(partial, 0o755)  # mkdtemp's is private
        yield partial
        for entry in [partial, *partial.rglob("*")]:
            sync(entry)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync(path.parent)
    except BaseException:
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def _is_ours(path: Path) -> bool:
    return any((path / mark).is_file() for mark in (STORE_MARK, EXPORT_MARK))
