"""One job at a time in a run folder: a lock that is released when its holders exit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from lbr_dist.errors import LaunchError
from lbr_dist.storage.files import make_private

LOCK = ".lock"
HELD = "LBR_RUN_LOCK"
"""Environment variable of a launcher's ranks: the run folder whose lock they share with the launcher."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LaunchError(
                f"{run_path}: another job is training in this run folder: {_holder(file.read())}. Wait for it, stop "
                "it, or use another run_dir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            message = f"note: {run_path}: its file system has no locks, so nothing stops a second job from using it"
            print(message, file=sys.stderr, flush=True)
        file.truncate(0)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        if "SLURM_JOB_ID" in os.environ:
            holder["job"] = os.environ["SLURM_JOB_ID"]
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield file.fileno()


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        job = f", Slurm job {found['job']}" if "job" in found else ""
        return f"process {found['process']} on {found['host']}{job}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "one that has not written its details yet"
