"""The architecture of a model that is here, on the Hub, or published; no weights are read."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gptq_jax.models.base import Architecture
from gptq_jax.models.published import PUBLISHED
from gptq_jax.models.registry import architecture_from_config
from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.hf_directory import read_json
from gptq_jax.storage.load import HUB_ID, open_source, read_architecture


def find_architecture(model: str) -> Architecture:
    """The architecture that the config of `model` describes.

    Args:
        model: a name in `PUBLISHED`, a directory with config.json (weights need not be there), a config.json, a
            checkpoint that `load` takes, or a Hub id, of which only config.json is downloaded.

    Raises:
        FileNotFoundError: there is no such model; the nearest names are offered.
        CheckpointError, ValueError: its config describes no model that is supported.
    """
    path = Path(model)
    if model.lower() in PUBLISHED:
        return architecture_from_config(PUBLISHED[model.lower()])
    if path.is_dir() and (path / "config.json").is_file():
        return _from_file(path / "config.json")
    if path.suffix == ".json" and path.is_file():
        return _from_file(path)
    if path.exists():
        return read_architecture(open_source(model))
    if HUB_ID.fullmatch(model):
        return _from_file(_download_config(model))
    near = get_close_matches(model.lower(), PUBLISHED, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"use one of {', '.join(PUBLISHED)}, or a path."
    raise FileNotFoundError(f"{model} is no model here and no shape that is known: {hint}")


def _from_file(file: Path) -> Architecture:
    config = read_json(file)
    if not isinstance(config, Mapping):
        raise CheckpointError(file, "is not a JSON object.")
    try:
        return architecture_from_config(config)
    except ValueError as error:
        raise CheckpointError(file, str(error)) from None


def _download_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason: Any = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{model} is not here, and its config.json cannot be had from the Hugging Face Hub: {reason}"
        ) from None
