"""`lbr logs`: what the ranks of a stage printed, and its job if it was submitted. Imports no torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.console import Say
from lbr_dist.errors import ConfigError
from lbr_dist.launch.commands.status import is_submitted, rows
from lbr_dist.status.rows import LIVING

_LOOK_EVERY = 3.0
"""Seconds without a new line until `--follow` asks again whether the stage has ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--stage", choices=JOB_STAGES, help="stage (default: the one that ran last)")
    parser.add_argument(
        "--rank", type=int, help="only this rank's log (default: rank 0's, and the job's if it was submitted)"
    )
    parser.add_argument("--lines", type=int, default=50, help="print this many of the last lines of each log")
    parser.add_argument("--follow", action="store_true", help="keep printing new lines until the stage has ended")


def run(args: argparse.Namespace, say: Say) -> None:
    """Print the last lines of a stage's logs, and with `--follow` the lines that are added.

    Raises:
        ConfigError: there is no such log; names the existing ones.
    """
    folder = args.run_folder.absolute()
    where = _of_slurm if is_submitted(args.run_folder) else _of_commands
    stage, paths = where(folder, args.stage, args.rank)
    files = {path: path.open("r", encoding="utf-8", errors="replace") for path in paths}
    try:
        for path, file in files.items():
            say(f"==> {path} <==")
            for line in file.readlines()[-args.lines :] if args.lines > 0 else ():
                say(line.rstrip("\n"))
        told = next(reversed(files))
        looked = time.monotonic()
        while args.follow:
            added = [(path, line) for path, file in files.items() for line in _whole_lines(file)]
            for path, line in added:
                if path != told:
                    say(f"==> {path} <==")
                    told = path
                say(line.rstrip("\n"))
            if not added and time.monotonic() - looked > _LOOK_EVERY:
                looked = time.monotonic()
                if not any(
                    row.state in LIVING for row in rows(folder) if row.stage == stage and row.run == str(folder)
                ):
                    return
            time.sleep(0.3)
    finally:
        for file in files.values():
            file.close()


def _whole_lines(file: TextIO) -> Iterator[str]:
    """The complete lines; a line without its end is left for the next call."""
    while True:
        before = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(before)
            return
        yield line


def _of_slurm(run: Path, asked: JobStage | None, rank: int | None) -> tuple[JobStage, list[Path]]:
    """The stage that ran last, if none is named, and the logs to print."""
    from lbr_dist.slurm import journal

    began = {stage: found[-1].began for stage in JOB_STAGES if (found := journal.tries(run, stage))}
    started = began or {stage: "" for stage in JOB_STAGES if journal.log_file(run, stage).exists()}
    if asked is None and not started:
        raise ConfigError(f"{run}: no stage has started. `lbr status` shows what it is waiting for.")
    stage = asked or _latest(started)
    job = [] if rank is not None else [journal.log_file(run, stage)]
    return stage, _existing([*job, _log(journal.rank_logs(run, stage), rank)])


def _of_commands(run: Path, asked: JobStage | None, rank: int | None) -> tuple[JobStage, list[Path]]:
    """The same for a run that a command started."""
    logs = {stage: _log(run / stage / "logs", None) for stage in JOB_STAGES}
    written = {stage: log.stat().st_mtime for stage, log in logs.items() if log.exists()}
    if asked is None and not written:
        raise ConfigError(f"{run}: found no log of a rank. `lbr status` shows how far the run is.")
    stage = asked or _latest(written)
    return stage, _existing([_log(run / stage / "logs", rank)])


def _latest(times: dict[JobStage, Any]) -> JobStage:
    return max(times, key=lambda stage: (times[stage], JOB_STAGES.index(stage)))


def _log(folder: Path, rank: int | None) -> Path:
    return folder / f"rank-{rank or 0}.log"


def _existing(paths: list[Path]) -> list[Path]:
    there = [path for path in paths if path.exists()]
    if not there:
        folder = paths[-1].parent
        others = ", ".join(path.name for path in sorted(folder.glob("rank-*.log"))) or "none"
        raise ConfigError(f"{paths[-1]}: no such log. Rank logs in {folder}: {others}.")
    return there
