"""The checkpoints of a stage on disk: what each contains, whether it is intact, and which ones are kept.

    checkpoints/step-000200/manifest.json             what was saved, and size and checksum of every file
                           /rank-00000.safetensors    each rank's share of the state
    checkpoints/latest.json                           the newest one, for people and scripts
    checkpoints/.saving-step-000400/                  being written; published by one rename
    checkpoints/set-aside/step-000400-1/              damaged or left behind: never read again, never deleted by a run

Checkpoints are ordered by step; times are only for people. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lbr_dist.config import CheckpointConfig
from lbr_dist.errors import CheckpointError
from lbr_dist.storage.files import checksum, make_private, sync, text_checksum, write_atomic

MANIFEST, POINTER, SET_ASIDE, REASON = "manifest.json", "latest.json", "set-aside", "reason.json"
FORMAT = 1
STATE_BYTES = 12
"""Bytes per trained parameter in a checkpoint: float32 master weight and two moments."""
_STEP = re.compile(r"step-(\d{6,})")
_UNFINISHED = (".saving-", ".deleting-")


def tag(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint contains: the content of `manifest.json`, which has its own checksum."""

    stage: str
    step: int
    world_size: int
    saved_at: str
    versions: dict[str, str]
    """Of lbr-dist, torch and deepspeed, and a checksum of lbr-dist's sources."""

    config: dict[str, Any]
    """The run's resolved config."""

    base: dict[str, Any]
    """Checksums that identify the model folder that the stage started from; see `base_identity`."""

    parameters: dict[str, list[int]]
    """Names and shapes of the trained parameters."""

    state: dict[str, Any]
    """What the training loop needs to resume."""

    values: dict[str, Any]
    """What was logged at this step."""

    score: float | None
    """The held-out loss; lower is better. None if it was not measured."""

    files: dict[str, dict[str, Any]]
    """``bytes`` and ``xxh3_128`` of every file but this one."""

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def to_text(self) -> str:
        """JSON, with the checksum of the rest in ``checksum``."""
        content = {"format": FORMAT} | _finite(asdict(self))
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"

    @staticmethod
    def parse(text: str, where: Path) -> Manifest:
        """Read what `to_text` wrote.

        Raises:
            CheckpointError: if the text was changed, or is of another format.
        """
        try:
            content = json.loads(text)
            found = content.pop("checksum")
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{where}: found format {content['format']}, expected {FORMAT}. Use the version of lbr-dist that "
                    "saved it."
                )
            if found != _checksum(content):
                raise ValueError("its checksum differs")
            return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: damaged ({error!r}).") from None


def _checksum(content: Mapping[str, Any]) -> str:
    return text_checksum(json.dumps(content, sort_keys=True))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Checkpoints:
    """The folder of a stage's checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, step: int) -> Path:
        return self.path / tag(step)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints in order, damaged or not."""
        if not self.path.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match and match[0] == tag(int(match[1])))

    def pointer(self) -> int | None:
        """The step in `latest.json`; None if there is no such file, or it cannot be read."""
        try:
            return int(json.loads((self.path / POINTER).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, step: int) -> Manifest:
        """The manifest of a checkpoint whose files all exist and have the right sizes. Does not read those files.

        Raises:
            CheckpointError: if one is missing or differs; names it.
        """
        folder = self.folder(step)
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never completed.") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
        manifest = Manifest.parse(text, path)
        if manifest.step != step:
            raise CheckpointError(f"{path}: found step {manifest.step}, expected {step} as in the folder's name.")
        for name, entry in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                raise CheckpointError(f"{folder / name}: missing, but {MANIFEST} lists it.") from None
            if size != entry["bytes"]:
                raise CheckpointError(f"{folder / name}: found {size:,} bytes, expected {entry['bytes']:,}.")
        return manifest

    def damaged_files(self, manifest: Manifest, names: Iterable[str]) -> list[str]:
        """Read files one after another; return a message for each damaged one."""
        problems = []
        for name in names:
            path = self.folder(manifest.step) / name
            try:
                found = checksum(path)
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror})")
                continue
            expected = manifest.files[name]["xxh3_128"]
            if found != expected:
                problems.append(f"{path}: its checksum is {found}, expected {expected}: the file is damaged")
        return problems

    def verify(self, step: int, threads: int = 4) -> Manifest:
        """Read a whole checkpoint, and compare its files with their checksums.

        Raises:
            CheckpointError: if a file is missing or damaged; names it.
        """
        manifest = self.read(step)
        with ThreadPoolExecutor(threads) as pool:
            found = [
                message
                for one in pool.map(lambda n: self.damaged_files(manifest, [n]), manifest.files)
                for message in one
            ]
        if found:
            raise CheckpointError("; ".join(found) + ".")
        return manifest

    def complete(self) -> list[Manifest]:
        """Manifests of the checkpoints whose files all exist and have the right sizes, in order of step."""
        found = []
        for step in self.steps():
            try:
                found.append(self.read(step))
            except CheckpointError:
                continue
        return found

    # ---- writing ---------------------------------------------------------------------------------------------------

    def saving(self, step: int) -> Path:
        """Where a checkpoint is written until it is published."""
        return self.path / f".saving-{tag(step)}"

    def begin(self, step: int) -> None:
        """Make the empty folder that the ranks write into."""
        make_private(self.path)
        shutil.rmtree(self.saving(step), ignore_errors=True)
        make_private(self.saving(step))

    def publish(self, manifest: Manifest) -> None:
        """Publish a checkpoint as a whole, by a rename, when all of its files are on disk."""
        building, folder = self.saving(manifest.step), self.folder(manifest.step)
        write_manifest(building, manifest)
        if folder.exists():
            self.set_aside(manifest.step, "saved again, by a run that resumed from an older one")
        building.rename(folder)
        sync(self.path)
        move_pointer(self.path, manifest)

    def set_aside(self, step: int, why: str) -> Path:
        """Move a checkpoint to `set-aside/`, with a note that says why. A run never deletes it."""
        parent = self.path / SET_ASIDE
        make_private(parent)
        number = 1
        while (parent / f"{tag(step)}-{number}").exists():
            number += 1
        place = parent / f"{tag(step)}-{number}"
        self.folder(step).rename(place)
        write_atomic(place / REASON, json.dumps({"why": why, "at": now()}) + "\n")
        sync(self.path)
        return place

    def remove(self, step: int) -> None:
        """Delete a checkpoint. Renamed first, so that a half-deleted one is never mistaken for a checkpoint."""
        place = self.path / f".deleting-{tag(step)}"
        shutil.rmtree(place, ignore_errors=True)
        self.folder(step).rename(place)
        shutil.rmtree(place)

    def clean(self) -> list[str]:
        """Delete what a killed job left unfinished, and return the names. The caller must hold the run's lock."""
        if not self.path.is_dir():
            return []
        left = [path for path in self.path.iterdir() if path.name.startswith(_UNFINISHED)]
        for path in left:
            shutil.rmtree(path)
        return sorted(path.name for path in left)

    def retain(self, settings: CheckpointConfig) -> list[int]:
        """Delete the checkpoints that no rule keeps. Returns their steps."""
        gone = superfluous(self.complete(), settings)
        for step in gone:
            self.remove(step)
        return gone


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes an unpublished checkpoint."""
    write_atomic(folder / MANIFEST, manifest.to_text())


def move_pointer(path: Path, manifest: Manifest) -> None:
    """Make `latest.json` name the newest checkpoint."""
    content = {"step": manifest.step, "tag": tag(manifest.step), "world_size": manifest.world_size}
    write_atomic(path / POINTER, json.dumps(content) + "\n")


def superfluous(complete: Sequence[Manifest], settings: CheckpointConfig) -> list[int]:
    """Steps of the complete checkpoints that no rule keeps. Damaged ones do not count as kept, and are not deleted."""
    kept = {manifest.step for manifest in complete[-settings.keep :]}
    if settings.keep_every:
        kept |= {manifest.step for manifest in complete if manifest.step % settings.keep_every == 0}
    scored = sorted((manifest.score, manifest.step) for manifest in complete if manifest.score is not None)
    kept |= {step for _, step in scored[: settings.keep_best]}
    return [manifest.step for manifest in complete if manifest.step not in kept]


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of a folder, which need not exist yet."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
