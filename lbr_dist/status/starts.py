"""The last start of a run by a command, and how it ended: `RUN/started.json`. Imports no torch.

Jobs of `lbr submit` record their attempts in `RUN/slurm/` instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from lbr_dist.config.cluster import JobStage
from lbr_dist.errors import LbrError
from lbr_dist.storage.files import write_atomic

STARTED = "started.json"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run."""

    stages: tuple[JobStage, ...]
    """What it was to do, in order."""

    command: str
    folder: str
    """Where the command was given: paths in it and in the config are relative to it."""

    launcher: str
    began: str
    ended: str = ""
    """Empty while it runs, and after it was killed."""

    reason: str = ""
    """Why it ended before it was done; empty if it finished."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))

    @property
    def again(self) -> str:
        """The command that resumes it."""
        command = self.command
        if self.folder != os.getcwd():
            command = f"cd {shlex.quote(self.folder)} && {command}"
        return command if self.launcher == "lbr" else f"{command}    (under {self.launcher}, on every rank)"

    @property
    def why(self) -> str:
        """Why it stopped, for a start that no process holds any more."""
        return self.reason or ("" if self.ended else "it was killed, or its machine went down: nothing was recorded")


@contextlib.contextmanager
def recorded(run: Path, stages: Sequence[JobStage], arguments: Sequence[str], launcher: str = "lbr") -> Iterator[None]:
    """Record a start and its end; the caller holds the run's lock.

    Args:
        run: the run folder.
        stages: what is to be done, in order.
        arguments: those of the `lbr` command.
        launcher: what started the ranks.
    """
    command = shlex.join(["lbr", *arguments])
    start = Start(tuple(stages), command, os.getcwd(), launcher, _now())
    _write(run, start)
    try:
        yield
    except BaseException as error:
        reason = error.reason if isinstance(error, LbrError) else f"{type(error).__name__}: {error}".rstrip(": ")
        if isinstance(error, KeyboardInterrupt):
            reason = "by a second Ctrl-C"
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            _write(run, replace(start, ended=_now(), reason=reason))
        raise
    _write(run, replace(start, ended=_now()))


def read(run: Path) -> Start | None:
    """The last start of a run; None if no command of this version has started it."""
    try:
        content = json.loads((run / STARTED).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Start)}
        return Start(**{key: content[key] for key in content if key in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"note: {run / STARTED}: cannot be read ({error})", file=sys.stderr)
        return None


def _write(run: Path, start: Start) -> None:
    write_atomic(run / STARTED, json.dumps(asdict(start), indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
