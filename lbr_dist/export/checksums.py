"""Checksums of an exported model, so that the next stage starts from exactly what was written. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from lbr_dist.config import RunConfig, StageName
from lbr_dist.errors import CheckpointError
from lbr_dist.storage.files import checksum

SUMMARY = "summary.json"
"""In a stage's folder: the last file that the stage writes."""

CHECKSUMS = "checksums.json"
"""In the exported folder: XXH3-128 of every other file, by its path in the folder."""


def is_finished(config: RunConfig, stage: StageName) -> bool:
    """Whether a stage has done its steps, and its model is exported."""
    return (config.stage_path(stage) / SUMMARY).exists() and (config.stage_export(stage) / "lbr.json").exists()


def identity(folder: Path) -> str | None:
    """Tells an exported model from any other, by its checksums; None if there is no export."""
    path = folder / CHECKSUMS
    return checksum(path) if path.exists() else None


def write_checksums(folder: Path) -> None:
    """Write `checksums.json`, the last file of an export."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    content = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify_export(folder: Path) -> None:
    """Check an exported folder against its checksums; files that were added later are ignored.

    Raises:
        CheckpointError: if a file is missing or damaged; names it.
    """
    try:
        expected = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CHECKSUMS}: cannot be read ({error}), so the model cannot be verified. Remove {folder} and run "
            "the stage that wrote it again: it will only export, not train."
        ) from None
    for name, sum_of in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing. Remove {folder} and run the stage again: it will only export, not train."
            )
        found = checksum(path)
        if found != sum_of:
            raise CheckpointError(
                f"{path}: damaged: found checksum {found}, expected {sum_of}. Remove {folder} and run the stage again: "
                "it will only export, not train."
            )
