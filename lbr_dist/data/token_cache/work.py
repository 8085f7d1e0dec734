"""The folder in which a token cache is made, and the finished parts in it that a later build can keep.

Its name is the cache's name, hidden, so that the next build finds it; the building process holds the cache's lock. If
locks cannot be trusted, the name is unique to the process, and no build resumes it. Besides the parts, it contains:

    tokenizer.json     the tokenizer
    done/host          the host of the build
    done/plan.json     what else the parts depend on
    done/00003.json    record of a finished part (part.py)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.token_cache.part import DONE, LENGTH, TOKENIZER_FILE, Part, TokenRules, part_file
from lbr_dist.storage.files import checksum, write_atomic
from lbr_dist.storage.fingerprint import signature
from lbr_dist.storage.whole_folder import building_folder, host

_HOST, _PLAN = "host", "plan.json"
_AT_WORK = 60.0
_SAME_EVERYWHERE = 4
"""How many values of a file's signature are the same on all nodes: all but the device number."""


def work_folder(cache: Path, locked: bool) -> tuple[Path, bool]:
    """The folder in which to make this cache, and whether a later build may resume there."""
    folder = cache.with_name(f".{cache.name}.building")
    if locked and not _another_writes(folder):
        return folder, True
    return building_folder(cache), False


def _another_writes(folder: Path) -> bool:
    """Whether another host seems to be writing here: on some file systems, other hosts do not see a lock."""
    try:
        if (folder / DONE / _HOST).read_text(encoding="utf-8") == host():
            return False
        newest = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
    except OSError:
        return False
    return time.time() - newest < _AT_WORK


def plan_of(files: Sequence[Path], weight: int, rules: TokenRules, folder: Path) -> dict[str, Any]:
    """Everything that determines the bytes of the parts, and the places in messages.

    Args:
        files: the corpus.
        weight: bytes per part, as in `units`.
        rules: see `TokenRules`.
        folder: contains the tokenizer's file.
    """
    plain = asdict(rules)
    if not plain["columns"]:
        del plain["columns"]  # as earlier versions wrote it: their unfinished builds stay good
    return {
        "files": [[str(file), *signature(file)[:_SAME_EVERYWHERE]] for file in files],
        "weight": weight,
        "rules": json.loads(json.dumps(plain)),  # as it is read back: no tuples
        "tokenizer": checksum(folder / TOKENIZER_FILE),
    }


def finished_parts(folder: Path, plan: Mapping[str, Any], rules: TokenRules) -> dict[int, Part]:
    """The parts finished by an earlier build with this plan. Removes everything else but the tokenizer's file."""
    done = folder / DONE
    parts: dict[int, Part] = {}
    if _read_plan(done / _PLAN) == plan:
        for record in done.glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                part = Part.from_json(record.read_text(encoding="utf-8"))
                if _is_whole(folder, part, rules):
                    parts[part.number] = part
    keep = {folder / TOKENIZER_FILE, done}
    keep |= {part_file(folder, number, kind) for number in parts for kind in ("tokens", "lengths")}
    keep |= {done / f"{number:05d}.json" for number in parts}
    for path in [each for each in (*folder.iterdir(), *done.glob("*")) if each not in keep]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done.mkdir(exist_ok=True)
    write_atomic(done / _HOST, host())
    write_atomic(done / _PLAN, json.dumps(plan))
    return parts


def finished_numbers(folder: Path) -> set[int]:
    """The numbers of the parts finished so far, by any rank."""
    return {int(record.stem) for record in (folder / DONE).glob("[0-9]*.json")}


def _read_plan(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_whole(folder: Path, part: Part, rules: TokenRules) -> bool:
    kinds = (("tokens", part.tokens, rules.dtype), ("lengths", part.documents, LENGTH))
    return all(
        part_file(folder, part.number, kind).stat().st_size == items * np.dtype(dtype).itemsize
        for kind, items, dtype in kinds
    )
