"""One job at a time in a run folder: a lock that is released when its holders exit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from lbr_dist.errors import LaunchError
from lbr_dist.storage.files import make_private

LOCK = ".lock"
HELD = "LBR_RUN_LOCK"
"""Environment variable of a launcher's ranks: the run folder whose lock they share with the launcher."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


_WAIT = 0.5
"""Seconds to wait for a lock: `holder` takes it for a moment."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that locked a run folder."""

    host: str
    process: int
    since: str
    job: str = ""
    """Its Slurm job."""

    def __str__(self) -> str:
        return (
            f"process {self.process} on {self.host}{f', Slurm job {self.job}' if self.job else ''}, since {self.since}"
        )


def holder(run_path: Path) -> Holder | None:
    """Who works in a run folder now; None if nobody does. Its details may be those of an earlier holder for a moment.

    Raises:
        LaunchError: the file system has no locks, so nobody can tell.
    """
    try:
        file = (run_path / LOCK).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(file.read()) or Holder("?", 0, "now")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise LaunchError(f"{run_path}: its file system has no locks, which would tell whether it runs.") from None
    return None


@contextlib.contextmanager
def run_lock(run_path: Path) -> Iterator[int | None]:
    """Lock the run folder. Gives the open file, which child processes may inherit; None if a launcher holds the lock.

    The lock belongs to the open file: it is released when the last process that has it open exits, for any reason.

    Raises:
        LaunchError: another job holds the lock; names host, process and job.
    """
    if os.environ.get(HELD) == str(run_path.absolute()):
        yield None
        return
    make_private(run_path)
    with (run_path / LOCK).open("a+", encoding="utf-8") as file:
        try:
            _take(file)
        except BlockingIOError:
            file.seek(0)
            who = _read(file.read()) or "one that has not written its details yet"
            raise LaunchError(
                f"{run_path}: another job is training in this run folder: {who}. Wait for it, stop it, or use another "
                "run_dir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            message = f"note: {run_path}: its file system has no locks, so nothing stops a second job from using it"
            print(message, file=sys.stderr, flush=True)
        file.truncate(0)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        me = Holder(socket.gethostname(), os.getpid(), now, os.environ.get("SLURM_JOB_ID", ""))
        file.write(json.dumps(asdict(me)) + "\n")
        file.flush()
        yield file.fileno()


def _take(file: IO[str]) -> None:
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _read(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
