"""A short hash of a set of files: equal for equal contents, whatever the files' names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from lbr_dist.errors import DataError
from lbr_dist.storage.files import write_atomic

_BLOCK = 16 << 20
_READ = 1 << 20
_SETTLED_NS = 60 * 10**9
"""Age from which a file's times can be trusted: any later write gets a different time, even on a coarse clock."""


def signature(file: Path) -> tuple[int, ...]:
    """Size, times and identity of a file. Its change time (ctime) cannot be set back.

    Raises:
        DataError: the file does not exist.
    """
    try:
        found = file.stat()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file, but its folder lists it. Copy the folder again.") from None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def visible_files(folder: Path) -> list[Path]:
    """Every file in a folder and below it, sorted; hidden files, and those in hidden folders, are left out."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def fingerprint(files: Sequence[Path], threads: int, known: Path, also: Iterable[str] = ()) -> str:
    """A hash, 32 hexadecimal digits, of the files' contents in order, and of `also`.

    SHA-256 because processors have instructions for it; in threads because it releases the interpreter lock.

    Args:
        files: read block by block.
        threads: how many blocks are read and hashed at once.
        known: a folder that stores the hash of each file with its signature, so that each file is read once.
        also: texts to include in the hash.
    """
    total = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            total.update(_file_digest(file, pool, known))
    for text in also:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()[:32]


def _file_digest(file: Path, pool: ThreadPoolExecutor, known: Path) -> bytes:
    seen = list(signature(file))
    entry = known / f"{hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(entry.read_text(encoding="utf-8"))
        if content["signature"] == seen:
            return bytes.fromhex(content["digest"])
    blocks = pool.map(_block_digest, repeat(file), range(0, seen[0], _BLOCK))
    digest = hashlib.sha256(b"".join(blocks)).digest()
    if time.time_ns() - max(seen[1:3]) > _SETTLED_NS and list(signature(file)) == seen:
        _remember(entry, {"file": str(file.absolute()), "signature": seen, "digest": digest.hex()})
    return digest


def _block_digest(file: Path, start: int) -> bytes:
    hashed = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        left = _BLOCK
        while left and (read := content.read(min(left, _READ))):
            hashed.update(read)
            left -= len(read)
    return hashed.digest()


def _remember(entry: Path, content: dict[str, object]) -> None:
    # a full or read-only disk costs only the time to hash again
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(entry, json.dumps(content))
