"""Directories that appear under their name only when all of them is on disk, whenever the process is killed.

Beside the target DIR lie, while it is written: .DIR.lock, held by the process that writes, and .DIR.partial (or
.DIR.unfinished, which a run that goes on keeps). Where the file system cannot exchange two directories in one step, the
old one is .DIR.replaced for a moment; whoever writes there next gives it its name back.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

STORE_MARK, EXPORT_MARK = "gptq_jax.json", "gptq_jax_export.json"  # what tells our directories from anybody else's
MARGIN = 64 * 2**20  # free bytes wanted beyond the content itself
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # of kernels and file systems that cannot


def check_target(path: str | os.PathLike[str], *, overwrite: bool, nbytes: int = 0) -> None:
    """Raise, before any work, if a directory of `nbytes` cannot be written to `path`.

    Raises:
        FileExistsError: something is there and `overwrite` is false, or it is no directory of this library's.
        FileNotFoundError: the parent directory does not exist.
        OSError: too little free space, or `path` is a mount point.
    """
    path = Path(path).resolve()
    if path.is_mount():
        raise OSError(f"{path} is a mount point, which cannot be replaced as a whole: name a directory inside it.")
    if beside(path, "replaced").exists():
        with locked(path):  # gives it its name back
            pass
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
    """A new directory that takes the place of `path` at the end, and leaves nothing behind if that is not reached.

    Raises:
        BlockingIOError: another process writes there.
    """
    path = path.resolve()  # beside what a link leads to, on its file system
    with locked(path):
        partial = beside(path, "partial")
        discard(partial)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            take_place(partial, path)
        finally:
            discard(partial)


def beside(path: Path, kind: str) -> Path:
    """The name beside the target `path` that is used for `kind`."""
    return path.with_name(f".{path.name}.{kind}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one that writes to the target `path`; see `acquire`."""
    lock = acquire(path)
    try:
        yield
    finally:
        release(lock)


def acquire(path: Path) -> IO[bytes]:
    """Lock the target `path`, and put right what a killed process left. The lock dies with its process, or `release`.

    Raises:
        BlockingIOError: it is locked.
    """
    while True:
        lock = open(beside(path, "lock"), "ab")  # noqa: SIM115  (closed by release)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BlockingIOError(
                f"{path} is being written by another process: wait for its end, or choose another place."
            ) from None
        if _is_still(lock):
            break
        lock.close()  # its holder took it away between our two steps
    replaced = beside(path, "replaced")
    if replaced.exists() and not path.exists():
        os.rename(replaced, path)
    discard(replaced)
    return lock


def release(lock: IO[bytes]) -> None:
    """Undo `acquire`."""
    if not lock.closed:
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def take_place(new: Path, path: Path) -> None:
    """Give the directory `new`, whole and on disk, the name `path`; what was there before is then at `new`."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        replaced = beside(path, "replaced")
        os.rename(path, replaced)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(replaced, path)
            raise
        os.rename(replaced, new)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a directory, if it is there; killed half way, it leaves nothing that could be taken for a whole one."""
    remains = folder.with_name(f"{folder.name}.discarded")
    shutil.rmtree(remains, ignore_errors=True)
    if folder.exists():
        os.rename(folder, remains)
        shutil.rmtree(remains, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Wait until a directory and all that it holds are on disk."""
    for entry in [folder, *folder.rglob("*")]:
        sync(entry)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON."""
    path.write_text(_indented(data))


def put_json(path: Path, data: Any) -> None:
    """As `write_json`, but by `put_file`."""
    put_file(path, _indented(data))


def put_file(path: Path, content: str | bytes) -> None:
    """Write a file that is on disk whole when this returns, and never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def _indented(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two directories in one step; False where that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(two))


def _is_still(lock: IO[bytes]) -> bool:
    """Whether the locked file is the one that others would open."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def _is_ours(path: Path) -> bool:
    return any((path / mark).is_file() for mark in (STORE_MARK, EXPORT_MARK))
