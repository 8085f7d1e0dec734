"""What submissions and attempts record in a run folder, for the jobs themselves and for `lbr status`.

    RUN/slurm/001/chain.json       a submission: its jobs, and the runs that they train (several for a sweep)
                 /config-0.yaml    each run's config as it was submitted
                 /code/            the package as it was submitted
                 /learn.sh …       the scripts that sbatch was given
    RUN/slurm/tries.jsonl          every attempt of every stage: where it ran, how it ended and why
    RUN/slurm/learn.log …          what a stage's job printed; the ranks' logs are in RUN/learn/logs/

Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config.cluster import JobStage
from lbr_dist.errors import ConfigError
from lbr_dist.storage.files import make_private, open_private, write_atomic

Outcome = Literal["finished", "interrupted", "failed", "refused", "lost"]
"""How an attempt ended. `interrupted`: asked to stop, and saved. `refused`: a node failed its check. `lost`: it could
not record its end, as when the first node dies."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a submission."""

    label: str
    """In a sweep, the values of this run: `seed=1 learn.steps=500`; otherwise empty."""

    run_dir: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A chain of jobs that was queued together."""

    folder: Path
    working_folder: str
    """Paths in the configs are relative to it."""

    python: str
    """Runs the job's own part on the first node, and the ranks unless `slurm.python` is set."""

    jobs: dict[JobStage, str]
    """Job ids of the stages that were not finished yet."""

    points: tuple[Point, ...]
    cancelled: str = ""
    """When `lbr cancel` ended it."""

    def config_file(self, index: int) -> Path:
        return self.folder / f"config-{index}.yaml"

    @property
    def is_sweep(self) -> bool:
        return len(self.points) > 1 or bool(self.points[0].label)

    def index_of(self, run: Path) -> int | None:
        """The index of the run with this folder; None if there is none."""
        folders = [Path(point.run_dir).resolve() for point in self.points]
        return folders.index(run.resolve()) if run.resolve() in folders else None

    def write(self) -> None:
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomic(self.folder / "chain.json", json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Submission:
        """Raises:
        ConfigError: the folder holds no submission.
        """
        try:
            content = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
            points = tuple(Point(**point) for point in content.pop("points"))
            # other versions may have written other keys
            known = {field.name for field in fields(Submission)}
            return Submission(folder, points=points, **{key: content[key] for key in content if key in known})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / 'chain.json'}: cannot be read ({error}).") from None


def submissions(run: Path) -> list[Submission]:
    """The submissions of a run folder or of a sweep's folder, oldest first."""
    folders = (path for path in (run / "slurm").glob("[0-9]*") if (path / "chain.json").exists())
    return [Submission.read(folder) for folder in sorted(folders, key=lambda path: int(path.name))]


def chain(run: Path) -> tuple[list[Submission], Path | None]:
    """The submissions of a run folder or a sweep's folder; and the run, if the folder is that of one run of a sweep.

    Raises:
        ConfigError: there is none.
    """
    found = find(run)
    if found is None:
        raise ConfigError(f"{run}: found no submission. Name a run folder: the run_dir of a config for `lbr submit`.")
    return found


def find(run: Path) -> tuple[list[Submission], Path | None] | None:
    """The same; None if nothing was submitted from this folder."""
    root = run.absolute()
    if found := submissions(root):
        return found, None
    if found := [each for each in submissions(root.parent.parent) if each.index_of(root) is not None]:
        return found, root
    return None


def new_folder(run: Path) -> Path:
    """Create the folder of the next submission."""
    make_private(run)
    make_private(run / "slurm")
    taken = [int(path.name) for path in (run / "slurm").glob("[0-9]*") if path.name.isdigit()]
    folder = run / "slurm" / f"{max(taken, default=0) + 1:03d}"
    make_private(folder)
    return folder


def log_file(run: Path, stage: JobStage) -> Path:
    """The log of a stage's job itself, over all attempts."""
    return run / "slurm" / f"{stage}.log"


def rank_logs(run: Path, stage: JobStage) -> Path:
    """The folder of the ranks' logs, `rank-N.log`."""
    return run / "slurm" / "evaluate-logs" if stage == "evaluate" else run / stage / "logs"


# ---- attempts ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Try:
    """One attempt of a stage."""

    stage: JobStage
    job: str
    nodes: str
    began: str
    first_step: int
    """Step of the newest checkpoint when it started."""

    ended: str = ""
    outcome: Outcome | Literal[""] = ""
    """Empty while it runs."""

    reason: str = ""
    last_step: int = 0
    """Step of the newest checkpoint when it ended."""

    blamed: list[str] = field(default_factory=list)
    """Nodes that the next attempt should avoid."""

    @property
    def progressed(self) -> bool:
        return self.last_step > self.first_step


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def note(run: Path, entry: dict[str, Any]) -> None:
    """Add a line to a run's `tries.jsonl`; it is on disk when this returns."""
    make_private(run / "slurm")
    with open(run / "slurm" / "tries.jsonl", "a", encoding="utf-8", opener=open_private) as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def begin(run: Path, stage: JobStage, job: str, nodes: str, step: int) -> None:
    note(run, {"event": "begin", "stage": stage, "job": job, "nodes": nodes, "began": now(), "first_step": step})


def end(run: Path, stage: JobStage, outcome: Outcome, reason: str, step: int, blamed: Iterable[str] = ()) -> None:
    entry = {"event": "end", "stage": stage, "outcome": outcome, "reason": reason, "ended": now(), "last_step": step}
    note(run, entry | {"blamed": list(blamed)})


def tries(run: Path, stage: JobStage) -> list[Try]:
    """A stage's attempts, oldest first; a line that a full disk cut off is skipped."""
    found: list[Try] = []
    try:
        lines = (run / "slurm" / "tries.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            event = entry.pop("event")
        except (ValueError, KeyError, AttributeError):
            continue
        if entry.get("stage") != stage:
            continue
        if event == "begin":
            found.append(Try(**entry))
        elif found:
            for name, value in entry.items():
                setattr(found[-1], name, value)
    return found
