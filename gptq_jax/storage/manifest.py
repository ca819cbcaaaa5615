"""gptq_jax.json: what a store holds, and the size and SHA-256 of every file of it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.directory import STORE_MARK as MANIFEST
from gptq_jax.storage.directory import write_json

VERSION = 2
READ = (1, 2)  # version 1 had all arrays in one Orbax checkpoint
CONFIG, REPORT, RUN, ARRAYS = "config.json", "report.json", "run.json", "arrays"


def write_manifest(folder: Path, quantized: dict[str, Any], dtypes: dict[str, str], files: dict[str, Any]) -> None:
    """Write the manifest of a store that is complete otherwise.

    Args:
        folder: of the store.
        quantized: the grid of each packed layer, as plain data.
        dtypes: of each array by name.
        files: what `file_entries` gives of the arrays' files; all others are added here.
    """
    others = [file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0] != ARRAYS]
    files = {**files, **file_entries((file for file in others if file.name != MANIFEST), folder)}
    manifest = {
        "format": "gptq-jax",
        "version": VERSION,
        "quantized": quantized,
        "dtypes": dtypes,
        "files": dict(sorted(files.items())),
    }
    write_json(folder / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})


def file_entries(files: Iterable[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by their path in `folder`."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest(file)}
        for file in sorted(files)
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of gptq_jax.json, its version and its own checksum checked."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "gptq-jax":
        raise CheckpointError(path / MANIFEST, "is not a manifest of gptq-jax.")
    if manifest.get("version") not in READ:
        raise CheckpointError(
            path / MANIFEST,
            f"is of version {manifest.get('version')}, but this gptq-jax reads versions {READ[0]} to {READ[-1]}.",
        )
    found = manifest.pop("sha256", None)
    if found != manifest_digest(manifest):
        raise CheckpointError(path / MANIFEST, "is damaged: its SHA-256 is not the one that was written.")
    for table in ("quantized", "dtypes", "files"):
        if not isinstance(manifest.get(table), dict):
            raise CheckpointError(path / MANIFEST, f"has no table {table!r}.")
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(path / MANIFEST, f"lists {name!r}, which lies outside the directory.")
        if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry):
            raise CheckpointError(path / MANIFEST, f"gives {name!r} no size and SHA-256.")
    if CONFIG not in manifest["files"]:
        raise CheckpointError(path / MANIFEST, f"does not list {CONFIG}.")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, files: dict[str, Any]) -> None:
    """Raise CheckpointError unless files are as they were written: sizes first, which costs nothing, then content."""
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(file, "is missing.")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(file, f"has {file.stat().st_size} bytes, but {entry['bytes']} were written.")
    for name, entry in files.items():
        if digest(path / name) != entry["sha256"]:
            raise CheckpointError(path / name, "is damaged: its SHA-256 is not the one that was written.")


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse one file; CheckpointError if it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(path, "is missing.") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}.") from None
