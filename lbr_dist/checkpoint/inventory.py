"""List the checkpoints in a run folder, for people and scripts. Reads manifests and file sizes, but no tensors.

A job may write, publish and delete checkpoints at the same time. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lbr_dist.checkpoint.manifest import MANIFEST, REASON, SET_ASIDE, Checkpoints, Manifest, tag
from lbr_dist.config import STAGES, StageName
from lbr_dist.console import size_text
from lbr_dist.errors import CheckpointError

State = Literal["complete", "damaged", "being written", "being deleted", "set aside"]

_OTHERS: tuple[tuple[re.Pattern[str], State], ...] = (
    (re.compile(r"\.saving-step-(\d+)"), "being written"),
    (re.compile(r"\.deleting-step-(\d+)"), "being deleted"),
)
_SET_ASIDE = re.compile(r"step-(\d+)-\d+")


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint: complete, damaged, unfinished or set aside."""

    stage: StageName
    step: int
    path: Path
    state: State
    reason: str | None
    """What is damaged, or why it was set aside."""

    num_bytes: int
    """Total size of its files."""

    age: float | None
    """Seconds since it was saved, or since it last changed if it has no readable manifest; never negative."""

    manifest: Manifest | None
    latest: bool = False
    """Whether it is the one that `latest_step` returns."""

    best: bool = False
    """Whether it has the lowest held-out loss of its stage's complete checkpoints."""

    def plain(self) -> dict[str, Any]:
        """As a dict for JSON."""
        found = self.manifest
        return {
            "stage": self.stage,
            "step": self.step,
            "path": str(self.path),
            "state": self.state,
            "reason": self.reason,
            "latest": self.latest,
            "best": self.best,
            "bytes": self.num_bytes,
            "age_seconds": None if self.age is None else round(self.age),
            "saved_at": found.saved_at if found else None,
            "ranks": found.world_size if found else None,
            "loss": found.values.get("loss") if found else None,
            "score": found.score if found else None,
        }


def checkpoints_of(run: Path, stage: StageName) -> Checkpoints:
    return Checkpoints(run / stage / "checkpoints")


def check_run(run: Path) -> None:
    """Check that this is a run folder.

    Raises:
        CheckpointError: if it is not; says what was found.
    """
    if (run / "config.yaml").is_file() or any(checkpoints_of(run, stage).path.is_dir() for stage in STAGES):
        return
    if not run.is_dir():
        found = "a file" if run.exists() else "nothing there"
    else:
        found = "a folder with neither config.yaml nor learn/checkpoints nor represent/checkpoints"
    raise CheckpointError(f"{run}: found {found}, expected a run folder. Name the run_dir of a config.")


def inventory(run: Path, stages: Sequence[StageName]) -> list[CheckpointRow]:
    """All checkpoints of the stages: published ones in order of their steps, then the others."""
    return [row for stage in stages for row in _stage(stage, checkpoints_of(run, stage))]


def latest_step(checkpoints: Checkpoints) -> int | None:
    """The step in `latest.json`; the newest published step if that names no published checkpoint."""
    steps, pointer = checkpoints.steps(), checkpoints.pointer()
    return pointer if pointer in steps else max(steps, default=None)


def best_step(complete: Sequence[Manifest]) -> int | None:
    """The step with the lowest held-out loss; the earliest if several are equal, None if none was measured."""
    scored = [(found.score, found.step) for found in complete if found.score is not None]
    return min(scored)[1] if scored else None


def _stage(stage: StageName, checkpoints: Checkpoints) -> Iterator[CheckpointRow]:
    states: dict[int, str | None] = {}
    complete = []
    for step in checkpoints.steps():
        try:
            complete.append(checkpoints.read(step))
            states[step] = None
        except CheckpointError as error:
            states[step] = str(error)
    latest, best = latest_step(checkpoints), best_step(complete)
    for step, problem in states.items():
        path = checkpoints.folder(step)
        if not path.is_dir():
            continue  # deleted since it was listed
        state: State = "complete" if problem is None else "damaged"
        reason = problem and problem.replace(f"{path}/", "").replace(f"{path}: ", "").rstrip(".")
        yield _row(stage, step, path, state, reason, step == latest, step == best)
    for path in _folders(checkpoints.path):
        for pattern, state in _OTHERS:
            if match := pattern.fullmatch(path.name):
                yield _row(stage, int(match[1]), path, state)
    for step, path in set_aside(checkpoints):
        yield _row(stage, step, path, "set aside", _reason(path))


def set_aside(checkpoints: Checkpoints) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that were set aside."""
    found = ((_SET_ASIDE.fullmatch(path.name), path) for path in _folders(checkpoints.path / SET_ASIDE))
    return [(int(match[1]), path) for match, path in found if match]


def _row(
    stage: StageName,
    step: int,
    path: Path,
    state: State,
    reason: str | None = None,
    latest: bool = False,
    best: bool = False,
) -> CheckpointRow:
    manifest = None
    with contextlib.suppress(OSError, CheckpointError):
        text = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
        manifest = Manifest.parse(text, path / MANIFEST)
    size, age = num_bytes(path), _age(path, manifest)
    return CheckpointRow(stage, step, path, state, reason, size, age, manifest, latest, best)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())
    except OSError:
        return []


def num_bytes(folder: Path) -> int:
    """Total size of the files in a folder, which may be changing."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def _age(path: Path, manifest: Manifest | None) -> float | None:
    """Zero if the clock was set back since, or if the machine that saved has a clock that is ahead."""
    now = datetime.now(UTC)
    try:
        if manifest is not None:
            return max(0.0, (now - datetime.fromisoformat(manifest.saved_at)).total_seconds())
        return max(0.0, now.timestamp() - path.stat().st_mtime)
    except (OSError, ValueError, TypeError):
        return None


def _reason(path: Path) -> str | None:
    try:
        return str(json.loads((path / REASON).read_text(encoding="utf-8"))["why"]).rstrip(".")
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- as a table ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[CheckpointRow]) -> str:
    """One line per checkpoint, under a line of headings."""
    lines = [("stage", "step", "size", "age", "ranks", "loss", "held-out", "state")]
    for row in rows:
        found = row.manifest
        loss = found.values.get("loss") if found else None
        ranks, score = (str(found.world_size), found.score) if found else ("-", None)
        marks = [name for name in ("latest", "best") if getattr(row, name)]
        state = f"{row.state}: {row.reason}" if row.reason else row.state
        size, age = size_text(row.num_bytes), _age_text(row.age)
        cells = (row.stage, str(row.step), size, age, ranks, _number(loss), _number(score))
        lines.append((*cells, ", ".join([state, *marks])))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:7], widths[1:], strict=True)), line[7]]
        )
        for line in lines
    )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _age_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def name(stage: StageName, step: int) -> str:
    return f"{stage} {tag(step)}"
