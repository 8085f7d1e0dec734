"""Folders that are complete or absent, whatever happens to the processes that make them.

A folder is made under a hidden name and renamed when everything in it is on disk. The rename alone makes it safe to run
two jobs at once; the lock only saves the second one the work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lbr_dist.console import Say
from lbr_dist.storage.files import sync

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_SAY_EVERY = 10.0
_IDLE = 24 * 3600.0


def building_folder(folder: Path) -> Path:
    """The hidden name under which this process makes `folder`."""
    return folder.parent / f".{folder.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}.building"


def flush(folder: Path) -> None:
    """Flush every file in a folder, and the names of all, to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def publish(building: Path, folder: Path) -> bool:
    """Flush a complete folder and give it its final name. Returns False if another job was faster."""
    flush(building)
    try:
        os.rename(building, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync(folder.parent)
    return True


def replace_folder(building: Path, folder: Path) -> None:
    """Flush a complete folder and give it its final name; an older folder of that name is deleted afterwards."""
    flush(building)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(building: Path) -> None:
    """Remove an unfinished folder, even if others are writing to it: their writes fail, and nothing is left behind."""
    gone = building_folder(building)
    try:
        building.rename(gone)
    except OSError:  # it does not exist, or the disk is too full for a new name
        gone = building
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, say: Say) -> Iterator[bool]:
    """Hold a lock that is released even if the process dies; reports waiting. Gives False if there are no locks."""
    began, said = time.monotonic(), float("-inf")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            while (held := try_lock(file.fileno())) == "busy":
                now = time.monotonic()
                if now - said >= _SAY_EVERY:
                    said = now
                    say(f"waiting for another job that is making the same files ({path}), {now - began:.0f} s so far")
                time.sleep(0.2)
            if held == "held" and not is_at(path, file.fileno()):
                continue  # the last holder removed the file: a third job may hold the lock on a new one
            try:
                yield held == "held"
            finally:
                path.unlink(missing_ok=True)
            return


def try_lock(file: int) -> Literal["held", "busy", "no locks"]:
    """Lock an open file, unless another process holds the lock or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return "no locks"
    return "held"


def is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def remove_stale(parent: Path, keep: Path | None = None) -> None:
    """Remove unfinished folders whose process has exited, or to which nothing was written for a day.

    Args:
        parent: where the folders are made.
        keep: a folder to keep, because this build resumes it.
    """
    for folder in parent.glob(".*.building"):
        if folder == keep:
            continue
        named = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.building", folder.name)
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            newest = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
            gone = named is not None and named[1] == host() and not _is_alive(int(named[2]))
            if gone or time.time() - newest > _IDLE:
                shutil.rmtree(folder)


def host() -> str:
    """Host and process namespace: process numbers are unique only within both, as containers have their own."""
    return f"{socket.gethostname().replace('.', '-')}-{os.stat('/proc/self/ns/pid').st_ino}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
