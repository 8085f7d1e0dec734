"""`lbr checkpoints RUN prune`: delete what no rule keeps, but never the only good checkpoint. Imports no torch."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lbr_dist.checkpoint.inventory import checkpoints_of, name, num_bytes, set_aside
from lbr_dist.checkpoint.manifest import Checkpoints, superfluous
from lbr_dist.config import CheckpointConfig, StageName
from lbr_dist.console import Say, size_text
from lbr_dist.errors import CheckpointError, ConfigError
from lbr_dist.launch.commands.verify import read_whole
from lbr_dist.storage.lock import run_lock


@dataclass
class _Pruning:
    """What to delete from a stage."""

    stage: StageName
    checkpoints: Checkpoints
    newest: int | None
    """The newest step that stays; None if none does."""

    steps: list[int]
    others: list[Path]
    """Checkpoints that were set aside."""


def prune(args: argparse.Namespace, stages: Sequence[StageName], say: Say) -> None:
    """Delete what no rule keeps, if the newest checkpoint that stays in each stage is read and found whole.

    Raises:
        CheckpointError: one of these is damaged; nothing is deleted.
        ConfigError: the rule is out of range, or not known.
        LaunchError: a job is training in the run folder.
    """
    run: Path = args.folder
    settings = _settings(args)
    with nullcontext() if args.dry_run else run_lock(run):
        found = [_planned(stage, checkpoints_of(run, stage), settings, args.set_aside) for stage in stages]
        todo = [one for one in found if one.steps or one.others]
        for one in todo:
            _refuse_without_good(one, say)
        freed = sum(_delete(one, args.dry_run, say) for one in todo)
    if not todo:
        say(f"{run}: nothing to delete")
    else:
        say(f"{'would free' if args.dry_run else 'freed'} {freed:,} bytes ({size_text(freed)})")


def _settings(args: argparse.Namespace) -> CheckpointConfig:
    path = args.folder / "config.yaml"
    if path.is_file():
        from lbr_dist.config.file import read_config

        settings = read_config(path).checkpoint
    elif args.keep is None:
        raise ConfigError(f"{path}: does not exist, so it is not known how many checkpoints to keep. Give --keep.")
    else:
        settings = CheckpointConfig()
    given = {key: getattr(args, key) for key in ("keep", "keep_every", "keep_best")}
    return replace(settings, **{key: value for key, value in given.items() if value is not None})


def _planned(stage: StageName, checkpoints: Checkpoints, settings: CheckpointConfig, others: bool) -> _Pruning:
    complete = checkpoints.complete()
    gone = superfluous(complete, settings)
    kept = [manifest.step for manifest in complete if manifest.step not in gone]
    aside = [path for _, path in set_aside(checkpoints)] if others else []
    return _Pruning(stage, checkpoints, kept[-1] if kept else None, gone, aside)


def _refuse_without_good(pruning: _Pruning, say: Say) -> None:
    where = pruning.checkpoints.path
    if pruning.newest is None:
        raise CheckpointError(
            f"{where}: has no complete checkpoint, so what was set aside may be all that is left of "
            f"{pruning.stage}. Nothing is deleted. Look at it, and delete manually what you do not need."
        )
    try:
        read_whole(pruning.stage, pruning.checkpoints, pruning.newest, say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).rstrip('.')}. It is the newest of {pruning.stage} that would be kept, so nothing is "
            f"deleted. Move {pruning.checkpoints.folder(pruning.newest)} out of the way, and try again."
        ) from None


def _delete(pruning: _Pruning, dry: bool, say: Say) -> int:
    """Returns the bytes freed."""
    verb, freed = "would be deleted" if dry else "deleted", 0
    for step in pruning.steps:
        size = num_bytes(pruning.checkpoints.folder(step))
        if not dry:
            pruning.checkpoints.remove(step)
        say(f"{name(pruning.stage, step)}: {verb}, {size_text(size)}")
        freed += size
    for path in pruning.others:
        size = num_bytes(path)
        if not dry:
            shutil.rmtree(path)
        say(f"{pruning.stage} {path.parent.name}/{path.name}: {verb}, {size_text(size)}")
        freed += size
    return freed
