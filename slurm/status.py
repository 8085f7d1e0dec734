"""The stages of a submitted run, from Slurm, the jobs' own records and the ranks' metrics. Imports no torch.

Slurm knows what is queued and running. If it has forgotten a job, and there is no accounting, the run folder still
shows how the job ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lbr_dist.config import RunConfig
from lbr_dist.config.cluster import JobStage
from lbr_dist.config.file import read_config
from lbr_dist.slurm import journal, scheduler
from lbr_dist.slurm.journal import Submission
from lbr_dist.slurm.scheduler import Job
from lbr_dist.status.rows import StageRow, progress, result
from lbr_dist.status.stages import is_finished, wanted


def rows(run: Path) -> list[StageRow]:
    """The chain of a run, of each run of a sweep, or of one run of a sweep.

    Raises:
        ConfigError: nothing was submitted from this folder.
        SlurmError: the controller does not answer.
    """
    found, only = journal.chain(run)
    jobs = scheduler.jobs([job for submission in found for job in submission.jobs.values()])
    latest = found[-1]
    indices = range(len(latest.points)) if only is None else [latest.index_of(only)]
    return [row for index in indices if index is not None for row in _run_rows(found, index, jobs)]


def _run_rows(found: Sequence[Submission], index: int, jobs: dict[str, Job]) -> list[StageRow]:
    latest = found[-1]
    config = read_config(latest.config_file(index))
    run = Path(latest.points[index].run_dir)
    rows: list[StageRow] = []
    for stage in wanted(config):
        asked = [(each, place) for each in found if stage in each.jobs and (place := each.index_of(run)) is not None]
        submission, name = None, ""
        if asked:
            submission, place = asked[-1]
            name = submission.jobs[stage] + (f"_{place}" if submission.is_sweep else "")
        before = rows[-1] if rows else None
        rows.append(_row(config, latest, run, index, stage, name, jobs.get(name), submission, before))
    return rows


def _row(
    config: RunConfig,
    latest: Submission,
    run: Path,
    index: int,
    stage: JobStage,
    name: str,
    job: Job | None,
    submission: Submission | None,
    before: StageRow | None,
) -> StageRow:
    # the submission has the absolute path of the run folder; the config may have a relative one
    here = _moved(config, run)
    tries = journal.tries(run, stage)
    state, reason = _state(here, run, stage, job, submission, before)
    row: dict[str, Any] = {"job": name, "tries": len(tries), "reason": reason}
    if job is not None and not job.is_over:
        row |= {"nodes": job.nodes, "limit_seconds": _until(job.ends) if state == "running" else None}
    elif tries:
        row["nodes"] = tries[-1].nodes
    row |= progress(here, stage, state) | (result(here, stage) if state == "finished" else {})
    return StageRow(str(run), latest.points[index].label, stage, state, **row)


def _moved(config: RunConfig, run: Path) -> RunConfig:
    return dataclasses.replace(config, run_dir=str(run))


def _state(
    config: RunConfig,
    run: Path,
    stage: JobStage,
    job: Job | None,
    submission: Submission | None,
    before: StageRow | None,
) -> tuple[str, str]:
    """The state, and the reason for it."""
    tries = journal.tries(run, stage)
    last = tries[-1].reason if tries else ""
    log = journal.log_file(run, stage)
    if is_finished(config, stage) and (job is None or job.state == "COMPLETED"):
        return "finished", ""
    if submission is None:
        return "not submitted", ""
    if job is not None and job.state == "PENDING":
        if job.reason == "Dependency":
            return "waiting", f"for {before.stage}" if before else job.reason
        return ("requeued", last) if tries else ("queued", job.reason)
    if job is not None and not job.is_over:
        return "running", last
    if submission.cancelled:
        return "cancelled", f"by `lbr cancel` at {submission.cancelled}"
    if before is not None and before.state in ("failed", "cancelled") and not tries:
        return "cancelled", f"{before.stage} {before.state}"
    if job is not None and job.state == "CANCELLED":
        return "cancelled", "by scancel"
    if tries and tries[-1].outcome:
        return "failed", last
    if job is not None and job.state == "TIMEOUT":
        return "failed", "it reached its time limit before it had saved: raise slurm.lead_seconds"
    if job is not None:
        return "failed", f"Slurm reports {job.state}{f' ({job.exit_code})' if job.exit_code else ''}; see {log}"
    return "unknown", f"Slurm has forgotten the job, and no record says how it ended; see {log}"


def _until(moment: str) -> float | None:
    try:
        return max(0.0, datetime.fromisoformat(moment).timestamp() - time.time())
    except ValueError:
        return None
