"""`lbr status`, `lbr logs` and `lbr cancel`. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.console import Say
from lbr_dist.errors import ConfigError
from lbr_dist.slurm import journal, scheduler
from lbr_dist.slurm.status import rows, table, to_json

_LIVING = ("running", "queued", "waiting", "requeued")


def status(args: argparse.Namespace, say: Say) -> None:
    """Print the state of each stage.

    Raises:
        ConfigError, SlurmError: no run was submitted, or Slurm does not answer.
    """
    if args.every <= 0:
        raise ConfigError(f"--every: found {args.every:g}, expected a positive number of seconds.")
    while True:
        found = [row for run in _runs(args.run_folder) for row in rows(run)]
        if args.watch and sys.stdout.isatty():
            say("\x1b[H\x1b[2J" + time.strftime("%H:%M:%S"))
        elif args.watch and not args.json:
            say(time.strftime("%H:%M:%S"))
        say(to_json(found) if args.json else table(found))
        if not args.watch or not any(row.state in _LIVING for row in found):
            return
        time.sleep(args.every)


def _runs(given: Path | None) -> list[Path]:
    if given is not None:
        return [given]
    found = sorted(path.parent.parent.parent for path in Path("runs").glob("*/slurm/*/chain.json"))
    if not found:
        raise ConfigError("runs/: found no submitted run. Name a run folder: lbr status RUN")
    return sorted(set(found))


def cancel(args: argparse.Namespace, say: Say) -> None:
    """Cancel all jobs of a run, the waiting ones first. What is saved stays, and `lbr submit` resumes from it.

    For one run of a sweep, these are its tasks of the job arrays.

    Raises:
        ConfigError, SlurmError: there is no such run, or Slurm does not answer.
    """
    found, only = journal.chain(args.run_folder)
    ids = [job for submission in found for job in submission.jobs.values()]
    living = {job.id for job in scheduler.jobs(ids, accounting=False).values() if not job.is_over}
    ours: list[tuple[JobStage, str]] = []
    for stage in reversed(JOB_STAGES):
        for submission in found:
            job = submission.jobs.get(stage, "")
            names = {name for name in living if name.split("_")[0] == job}
            if only is not None:
                names &= {f"{job}_{submission.index_of(only)}"}
            ours += [(stage, job if only is None else name) for name in sorted(names)]
    if not ours:
        say(f"{args.run_folder}: none of its jobs is queued or running")
        return
    if only is None:  # before the jobs end, so that `lbr status` knows who cancelled them
        dataclasses.replace(found[-1], cancelled=journal.now()).write()
    for stage, job in dict.fromkeys(ours):
        scheduler.cancel([job])
        say(f"{stage:<10} job {job} is cancelled")


def logs(args: argparse.Namespace, say: Say) -> None:
    """Print the last lines of a stage's logs, and with `--follow` the lines that are added.

    Raises:
        ConfigError: there is no such log; names the existing ones.
    """
    run = args.run_folder.absolute()
    stage = args.stage or _last_stage(run)
    paths = _paths(run, stage, args.rank)
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
            if not added and time.monotonic() - looked > 3:
                looked = time.monotonic()
                if not any(row.state in _LIVING for row in rows(run) if row.stage == stage and row.run == str(run)):
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


def _last_stage(run: Path) -> JobStage:
    began = {stage: found[-1].began for stage in JOB_STAGES if (found := journal.tries(run, stage))}
    if not began:
        with_log = [stage for stage in JOB_STAGES if journal.log_file(run, stage).exists()]
        if not with_log:
            raise ConfigError(f"{run}: no stage has started. `lbr status` shows what it is waiting for.")
        return with_log[-1]
    return max(JOB_STAGES, key=lambda stage: (began.get(stage, ""), JOB_STAGES.index(stage)))


def _paths(run: Path, stage: JobStage, rank: int | None) -> list[Path]:
    folder = journal.rank_logs(run, stage)
    first = folder / f"rank-{rank or 0}.log"
    paths = [first] if rank is not None else [journal.log_file(run, stage), first]
    there = [path for path in paths if path.exists()]
    if not there:
        others = ", ".join(path.name for path in sorted(folder.glob("rank-*.log"))) or "none"
        raise ConfigError(f"{paths[-1]}: no such log. Rank logs in {folder}: {others}.")
    return there
