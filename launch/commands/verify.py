"""`lbr checkpoints RUN verify`; export and prune read the whole checkpoint first, too. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lbr_dist.checkpoint.inventory import best_step, checkpoints_of, latest_step, name
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest
from lbr_dist.config import StageName
from lbr_dist.console import Say, size_text
from lbr_dist.errors import CheckpointError


def chosen(run: Path, stages: Sequence[StageName], wanted: str | None) -> list[tuple[StageName, Checkpoints, int]]:
    """The checkpoints that `--step` selects in each stage; all of them for None.

    Raises:
        CheckpointError: nothing matches; the message names those that exist.
    """
    found: list[tuple[StageName, Checkpoints, int]] = []
    for stage in stages:
        checkpoints = checkpoints_of(run, stage)
        named = {"best": best_step(checkpoints.complete()), "latest": latest_step(checkpoints)}
        meant = [step for step in checkpoints.steps() if wanted in (None, str(step)) or step == named.get(str(wanted))]
        found += [(stage, checkpoints, step) for step in meant]
    if not found:
        there = [name(stage, step) for stage in stages for step in checkpoints_of(run, stage).steps()]
        has = f"{run} has {', '.join(there) or 'no checkpoint of ' + ' or '.join(stages)}"
        if wanted is None:
            raise CheckpointError(f"{has}.")
        unscored = ", none of them complete and with a held-out loss" if wanted == "best" and there else ""
        raise CheckpointError(f"--step: found {wanted}, but {has}{unscored}. Name an existing step.")
    return found


def read_whole(stage: StageName, checkpoints: Checkpoints, step: int, say: Say) -> Manifest:
    """Read a checkpoint, compare it with its checksums, and print the result.

    Raises:
        CheckpointError: it is damaged.
    """
    expected = checkpoints.read(step).num_bytes
    say(f"{name(stage, step)}: reading {size_text(expected)}")
    began = time.perf_counter()
    manifest = checkpoints.verify(step)
    seconds = max(time.perf_counter() - began, 1e-9)
    say(f"{name(stage, step)}: ok, {expected:,} bytes in {seconds:.2f} s, {expected / seconds / 1e9:.2f} GB/s")
    return manifest


def verify(run: Path, stages: Sequence[StageName], wanted: str | None, say: Say) -> None:
    """Read checkpoints and compare them with their checksums; a damaged one does not stop this.

    Raises:
        CheckpointError: some are damaged, and the message names them; or there are none.
    """
    found, damaged = chosen(run, stages, wanted), []
    for stage, checkpoints, step in found:
        try:
            read_whole(stage, checkpoints, step, say)
        except CheckpointError as error:
            say(f"{name(stage, step)}: damaged: {error}")
            damaged.append(name(stage, step))
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(found)} checkpoints read {'is' if len(damaged) == 1 else 'are'} damaged: "
            f"{', '.join(damaged)}. A run resumes from the newest one that is whole."
        )
