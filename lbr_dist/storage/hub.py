"""Model folders by name: a folder, or a model of the Hugging Face Hub that is in its cache. Nothing is fetched."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lbr_dist.errors import ModelError

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def cached_model(name: str) -> Path | None:
    """The folder of a Hub model in the Hugging Face cache, by its id (`Qwen/Qwen3-0.6B`); None if it is not there."""
    if not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def model_folder(name: str | Path, field: str) -> Path:
    """The folder that a name means.

    Args:
        name: a path, or the id of a model on the Hub.
        field: the setting or argument, for messages.

    Raises:
        ModelError: there is no such folder, and no such model in the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    found = None if folder.exists() else cached_model(str(name))
    if found is None:
        raise ModelError(f"{field}: found {str(name)!r}, which is {why_not_a_folder(str(name))}")
    return found


def why_not_a_folder(name: str) -> str:
    """What is wrong with a name that means no folder, and what to do, as the end of a sentence."""
    folder = Path(name)
    if folder.exists():
        return "not a folder but a file. Give a Hugging Face model folder."
    beside = [each.name for each in folder.parent.iterdir() if each.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, n=1)
    there = f" Did you mean {str(folder.with_name(close[0]))!r}?" if close else ""
    if not _HUB_ID.fullmatch(name):
        return f"not a folder: no such folder.{there} Check the path and, if it is relative, the working directory."
    return (
        f"not a folder: no such folder, and no such model in the Hugging Face cache.{there} If it is a model of the "
        f"Hub, `hf download {name}` fetches it."
    )
