"""Folders that are there as a whole or not at all, whatever happens to the processes that make them.

A folder is made under a hidden name and renamed when everything in it is on the disk. The rename alone makes two jobs
at once safe; the lock only saves the second one the work.
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
from collections.abc import Callable, Iterator
from pathlib import Path

from lbr_dist.files import sync

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_SAY_EVERY = 10.0
_IDLE = 24 * 3600.0


def building_folder(folder: Path) -> Path:
    """The hidden name under which this process makes `folder`."""
    return folder.parent / f".{folder.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.building"


def publish(building: Path, folder: Path) -> bool:
    """Give a complete folder, its files flushed, its name; False where another job was faster."""
    sync(building)
    try:
        os.rename(building, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync(folder.parent)
    return True


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock that dies with its process, and says while it waits; without locks in the file system, goes on."""
    with path.open("ab") as file:
        began, said = time.monotonic(), float("-inf")
        while not _try_lock(file.fileno()):
            now = time.monotonic()
            if now - said >= _SAY_EVERY:
                said = now
                say(f"waiting for another job that makes the same files ({path}), {now - began:.0f} s so far")
            time.sleep(0.2)
        try:
            yield
        finally:
            # who waits on this file still gets its lock, finds the work done, and goes on
            path.unlink(missing_ok=True)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def remove_stale(parent: Path) -> None:
    """Remove what killed processes left unfinished: their process is gone, or nothing was written for a day."""
    for folder in parent.glob(".*.building"):
        named = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.building", folder.name)
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            newest = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
            gone = named is not None and named[1] == _host() and not _is_alive(int(named[2]))
            if gone or time.time() - newest > _IDLE:
                shutil.rmtree(folder)


def _host() -> str:
    """Where a process number means the same process: containers of one host may count their own."""
    return f"{socket.gethostname().replace('.', '-')}-{os.stat('/proc/self/ns/pid').st_ino}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
