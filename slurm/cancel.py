"""`lbr cancel`. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses

from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.console import Say
from lbr_dist.slurm import journal, scheduler


def run(args: argparse.Namespace, say: Say) -> None:
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
