"""Atomic writes, checksums, and who else may write a file. Imports no torch."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

import xxhash

READ_BYTES = 4 << 20


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for files that only this user can write, whatever the umask."""
    return os.open(path, flags, 0o644)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old or the new one, never a part. On disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", opener=open_private) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def checksum(path: Path) -> str:
    """XXH3-128 of a file, in hexadecimal: detects corruption by disks, networks and copies, at reading speed."""
    hashed = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while read := stream.readinto(buffer):
            hashed.update(buffer[:read])
    return hashed.hexdigest()


def text_checksum(text: str) -> str:
    """XXH3-128 of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


# ---- who else may write --------------------------------------------------------------------------------------------


def make_private(folder: Path) -> None:
    """Make a folder that only this user can write, whatever the umask. An existing folder stays as it is."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(folder.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def others_who_write(path: Path, trust_group: bool) -> str | None:
    """Who besides this user and root can change a file or folder; None if nobody can.

    Args:
        path: links are followed.
        trust_group: ignore write access of the file's group.
    """
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        return f"its owner, user {_user(found.st_uid)}"
    if found.st_mode & stat.S_IWOTH:
        return "every user"
    if found.st_mode & stat.S_IWGRP and not trust_group and not _is_own_group(found.st_gid):
        return f"every member of the group {_group(found.st_gid)}"
    return None


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _is_own_group(gid: int) -> bool:
    """Whether a group is the private group that some systems give each user, with no other members."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
