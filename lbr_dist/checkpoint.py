"""Sharded checkpoints of a stage: saved by all ranks, then published by one atomic rename.

`checkpoints/step-000200/` holds DeepSpeed's shards; `checkpoints/latest.json` names the newest complete one. A
folder that the pointer does not name was never finished, or is older.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lbr_dist.config import CheckpointConfig
from lbr_dist.distributed import Ranks
from lbr_dist.engine import Engine
from lbr_dist.errors import CheckpointError

POINTER = "latest.json"


def _tag(step: int) -> str:
    return f"step-{step:06d}"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old or the new one, never a part; it is on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _random_state(ranks: Ranks) -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _restore_random_state(state: dict[str, Any], ranks: Ranks) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], ranks.device)


def save(engine: Engine, folder: Path, state: dict[str, Any], ranks: Ranks, settings: CheckpointConfig) -> None:
    """Save after ``state["step"]`` steps; the pointer moves when every rank's shards are written."""
    step = state["step"]
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save(folder, _tag(step), state | {"random": _random_state(ranks)})
    dist.barrier()  # DeepSpeed's own save does not wait for the other ranks' shards
    if ranks.is_first:
        content = {"tag": _tag(step), "step": step, "world_size": ranks.world_size}
        write_atomic(folder / POINTER, json.dumps(content) + "\n")
        for old in sorted(folder.glob("step-*"))[: -settings.keep]:
            if old.name != _tag(step):
                shutil.rmtree(old)
    dist.barrier()


def latest(folder: Path) -> dict[str, Any] | None:
    """What the pointer says: ``tag``, ``step`` and ``world_size``; None where nothing was saved.

    Raises:
        CheckpointError: the pointer is damaged, or names a folder that is gone.
    """
    path = folder / POINTER
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] = {
            "tag": str(content["tag"]),
            "step": int(content["step"]),
            "world_size": int(content["world_size"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}). Delete it to start the stage again.") from None
    if not (folder / found["tag"]).is_dir():
        raise CheckpointError(
            f"{path}: names {found['tag']}, which is gone. Delete {POINTER} to start the stage again."
        )
    return found


def resume(engine: Engine, folder: Path, ranks: Ranks, settings: CheckpointConfig) -> dict[str, Any] | None:
    """Go on from the newest checkpoint, where there is one and `settings` allows it. Returns the state it was saved
    with.

    Raises:
        CheckpointError: the checkpoint was written by another number of ranks, or cannot be read.
    """
    found = latest(folder) if settings.resume == "auto" else None
    if found is None:
        return None
    if found["world_size"] != ranks.world_size:
        raise CheckpointError(
            f"{folder / found['tag']}: written by {found['world_size']} ranks, this run has {ranks.world_size}. "
            f"Run with --ranks {found['world_size']}, or start again with --checkpoint.resume never."
        )
    state = engine.load(folder, found["tag"])
    _restore_random_state(state["random"], ranks)
    if ranks.is_first:
        print(f"resumed after step {state['step']} from {folder / found['tag']}", file=sys.stderr, flush=True)
    return state
