"""The folder in which a token cache is made: what is finished in it, for a build that goes on where one was cut off.

Its name is that of the cache, hidden, so that the next build finds it; who makes it holds the cache's lock. Where locks
cannot be trusted, the name is this process's own, and nothing is gone on with. Beside the parts:

    tokenizer.json     what makes the tokens
    done/host          who makes them
    done/plan.json     what else the parts depend on
    done/00003.json    what became of a finished part (token_parts.py)
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
"""Of a file's signature, how much of it two nodes see alike: not the number of the device."""


def work_folder(cache: Path, locked: bool) -> tuple[Path, bool]:
    """Where the cache of this name is made, and whether a later build may go on there."""
    folder = cache.with_name(f".{cache.name}.building")
    if locked and not _another_writes(folder):
        return folder, True
    return building_folder(cache), False


def _another_writes(folder: Path) -> bool:
    """Whether a process of another host seems to be at work: some file systems keep a lock to the host that took it."""
    try:
        if (folder / DONE / _HOST).read_text(encoding="utf-8") == host():
            return False
        newest = max(each.stat().st_mtime for each in (folder, *folder.iterdir()))
    except OSError:
        return False
    return time.time() - newest < _AT_WORK


def plan_of(files: Sequence[Path], weight: int, rules: TokenRules, folder: Path) -> dict[str, Any]:
    """What decides the bytes of every part, and the places in messages.

    Args:
        files: of the corpus.
        weight: bytes of a part, as `units` takes it.
        rules: see there.
        folder: with the tokenizer's file in it.
    """
    return {
        "files": [[str(file), *signature(file)[:_SAME_EVERYWHERE]] for file in files],
        "weight": weight,
        "rules": asdict(rules),
        "tokenizer": checksum(folder / TOKENIZER_FILE),
    }


def finished_parts(folder: Path, plan: Mapping[str, Any], rules: TokenRules) -> dict[int, Part]:
    """The parts that an earlier build with this plan has finished; all else is removed, but the tokenizer's file."""
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
    """The numbers of the parts that are finished by now, by whichever rank."""
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
