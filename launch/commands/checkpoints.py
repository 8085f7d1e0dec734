"""`lbr checkpoints`: list, verify, export or prune a run's checkpoints. Only `export` imports torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lbr_dist.checkpoint.inventory import (
    check_run,
    inventory,
    name,
    table,
)
from lbr_dist.checkpoint.manifest import MANIFEST, tag
from lbr_dist.config import STAGES, StageName
from lbr_dist.console import Say
from lbr_dist.errors import CheckpointError, ConfigError
from lbr_dist.launch.commands.prune import prune
from lbr_dist.launch.commands.verify import chosen, read_whole, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lbr checkpoints`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder: the run_dir of a config")
    parser.add_argument("--json", action="store_true", help="the list as JSON")
    parser.add_argument("--stage", choices=STAGES, help="only this stage")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="without one, the checkpoints are listed")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        # without a default, so that a --stage given before the action is kept
        sub.add_argument("--stage", choices=STAGES, default=argparse.SUPPRESS, help="only this stage")
        return sub

    step = "step of a checkpoint, `latest`, or `best` (lowest held-out loss)"
    sub = action("verify", "Read checkpoints and compare them with their checksums.")
    sub.add_argument("--step", help=f"{step} (default: all)")
    sub = action("export", "Write the model of a checkpoint as a Hugging Face and sentence-transformers folder.")
    sub.add_argument("--step", required=True, help=step)
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--base", type=Path, help="the model that the stage started from, if it has moved since")
    sub = action("prune", "Delete checkpoints that no rule keeps, if the newest one to keep is whole.")
    sub.add_argument("--keep", type=int, help="keep this many of the newest (default: as in the run's config)")
    sub.add_argument("--keep-every", type=int, help="also keep steps that are multiples of this")
    sub.add_argument("--keep-best", type=int, help="also keep this many with the lowest held-out loss")
    sub.add_argument("--set-aside", action="store_true", help="also delete checkpoints that were set aside")
    sub.add_argument("--dry-run", action="store_true", help="only print what would be deleted")


def run(args: argparse.Namespace, say: Say) -> None:
    """Run the action.

    Raises:
        CheckpointError, ConfigError, LaunchError, ModelError: see the messages.
    """
    check_run(args.folder)
    if args.json and args.action:
        raise ConfigError(f"--json: found with {args.action}, expected only with the list. Leave it out.")
    stages: Sequence[StageName] = [args.stage] if args.stage else STAGES
    if args.action == "verify":
        verify(args.folder, stages, args.step, say)
    elif args.action == "export":
        export(args.folder, stages, args.step, args.out, args.base, say)
    elif args.action == "prune":
        prune(args, stages, say)
    else:
        rows = inventory(args.folder, stages)
        if args.json:
            say(json.dumps({"run": str(args.folder), "checkpoints": [row.plain() for row in rows]}, indent=1))
        else:
            say(table(rows) if rows else f"{args.folder}: no checkpoints of {' and '.join(stages)}")


# ---- export --------------------------------------------------------------------------------------------------------


def export(run: Path, stages: Sequence[StageName], wanted: str, out: Path, base: Path | None, say: Say) -> None:
    """Write the model of a checkpoint, after reading all of it and checking it.

    Raises:
        CheckpointError, ConfigError, ModelError: see the messages; nothing has been written.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        there = "a folder with files in it" if out.is_dir() else "a file"
        raise ConfigError(f"--out: found {str(out)!r}, {there}. Name an empty folder, or a new one.")
    found = chosen(run, stages, wanted)
    if len(found) > 1:
        raise ConfigError(f"--stage: not given, and both stages have {wanted}. Add `--stage learn` or `represent`.")
    stage, checkpoints, step = found[0]
    folder = checkpoints.folder(step)
    try:
        manifest = read_whole(stage, checkpoints, step, say)
    except CheckpointError as error:
        others = ", ".join(tag(other) for other in checkpoints.steps() if other != step) or "no other"
        raise CheckpointError(f"{str(error).rstrip('.')}. {checkpoints.path} also has {others}.") from None

    from lbr_dist.config.file import from_plain
    from lbr_dist.export.from_checkpoint import export_checkpoint
    from lbr_dist.ranks.process import quiet_libraries

    quiet_libraries()
    # the run folder may have moved since the checkpoint was written
    config = replace(from_plain(manifest.config, folder / MANIFEST), run_dir=str(run))
    say(f"{name(stage, step)}: writing its model")
    try:
        export_checkpoint(folder, manifest, config, base or config.stage_base(stage), out)
    except FileNotFoundError:
        if folder.is_dir():
            raise
        raise CheckpointError(
            f"{folder}: was deleted by the training job while it was read. Export a newer checkpoint, or raise "
            "checkpoint.keep."
        ) from None
    say(f"written to {out}")
