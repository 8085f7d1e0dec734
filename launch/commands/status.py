"""`lbr status`: the stages of a run, started on this machine or submitted to Slurm. Imports no torch."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path

from lbr_dist.console import Say
from lbr_dist.errors import ConfigError, LbrError
from lbr_dist.status import local, starts
from lbr_dist.status.rows import LIVING, StageRow, table, to_json

RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="run folder (default: all in runs/)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="repeat until every stage has ended")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="with --watch: seconds between two updates"
    )


def run(args: argparse.Namespace, say: Say) -> None:
    """Print the state of each stage of a run, or of all runs in `runs/`.

    Raises:
        ConfigError, SlurmError: there is no run, or Slurm does not answer.
    """
    if args.every <= 0:
        raise ConfigError(f"--every: found {args.every:g}, expected a positive number of seconds.")
    while True:
        found = rows(args.run_folder) if args.run_folder is not None else _all()
        if args.watch and sys.stdout.isatty():
            say("\x1b[H\x1b[2J" + time.strftime("%H:%M:%S"))
        elif args.watch and not args.json:
            say(time.strftime("%H:%M:%S"))
        say(to_json(found) if args.json else table(found))
        if not args.watch or not any(row.state in LIVING for row in found):
            return
        time.sleep(args.every)


def is_submitted(run: Path) -> bool:
    """Whether a run's last start was by `lbr submit`, and not by a command.

    Raises:
        ConfigError: the folder holds no run.
    """
    from lbr_dist.slurm import journal

    found = journal.find(run)
    if found is None:
        if (run / "config.yaml").exists():
            return False
        raise ConfigError(
            f"{run}: found no run. Name a run folder: the run_dir of a config given to `lbr run` or `lbr submit`."
        )
    latest, only = found[0][-1], found[1]
    start = starts.read(run)
    index = 0 if only is None else latest.index_of(only)
    if start is None or index is None:
        return True
    return datetime.fromisoformat(start.began).timestamp() < latest.config_file(index).stat().st_mtime


def rows(run: Path) -> list[StageRow]:
    """The stages of a run, or of each run of a sweep.

    Raises:
        ConfigError, SlurmError: there is no run, or Slurm does not answer.
    """
    if not is_submitted(run):
        return local.rows(run)
    from lbr_dist.slurm import status

    return status.rows(run)


def _all() -> list[StageRow]:
    """The stages of all runs in `runs/`. A run that cannot be read does not hide the others."""
    submitted = {path.parent.parent.parent for path in RUNS.glob("*/slurm/*/chain.json")}
    found = sorted(submitted | {path.parent for path in RUNS.glob("*/config.yaml")})
    if not found:
        raise ConfigError(f"{RUNS}/: found no run. Name a run folder: lbr status RUN")
    shown: list[StageRow] = []
    for run in found:
        try:
            shown += rows(run)
        except LbrError as error:
            shown.append(StageRow(str(run.absolute()), "", "", "unknown", reason=error.reason))
    return shown
