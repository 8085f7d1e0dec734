"""`lbr status`: a run's chain, from Slurm, the jobs' own records and the ranks' metrics. Imports no torch.

Slurm knows what is queued and running. If it has forgotten a job, and there is no accounting, the run folder still
shows how the job ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lbr_dist.config import RunConfig
from lbr_dist.config.cluster import JOB_STAGES, JobStage
from lbr_dist.config.file import read_config
from lbr_dist.console import clock
from lbr_dist.slurm import journal, scheduler
from lbr_dist.slurm.journal import Submission
from lbr_dist.slurm.scheduler import Job

_TAIL_BYTES = 64 * 1024
_RATES = (("tokens_per_second", "tokens/s"), ("pairs_per_second", "pairs/s"))


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage of one run."""

    run: str
    label: str
    """In a sweep, the values of this run; otherwise empty."""

    stage: JobStage
    state: str
    """`finished`, `failed`, `cancelled`, `waiting`, `queued`, `running`, `requeued`, `not submitted`, `unknown`."""

    job: str = ""
    nodes: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    rate: float | None = None
    """Tokens or pairs per second."""

    rate_unit: str = ""
    left_seconds: float | None = None
    """Training time left, at the pace of its last steps."""

    limit_seconds: float | None = None
    """Until the job's time limit."""

    tries: int = 0
    reason: str = ""
    """Why it is waiting, or why its last attempt ended."""


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
    wanted: dict[JobStage, bool] = {
        "learn": config.learn.steps > 0,
        "represent": config.represent.steps > 0,
        "evaluate": config.data.test is not None,
    }
    rows: list[StageRow] = []
    for stage in JOB_STAGES:
        if wanted[stage]:
            asked = [
                (each, place) for each in found if stage in each.jobs and (place := each.index_of(run)) is not None
            ]
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
    if stage != "evaluate":
        row |= _progress(here, stage, state)
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
    if journal.is_finished(config, stage) and (job is None or job.state == "COMPLETED"):
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


def _progress(config: RunConfig, stage: JobStage, state: str) -> dict[str, Any]:
    """From the metrics: step, loss, pace, and the time left at that pace."""
    assert stage != "evaluate"
    steps = config.stage(stage).steps
    lines = [line for line in _tail(config.stage_path(stage) / "metrics.jsonl") if line.get("step")]
    if not lines:
        return {"step": 0, "steps": steps}
    last = lines[-1]
    found: dict[str, Any] = {"step": last["step"], "steps": steps, "loss": last.get("loss")}
    for name, unit in _RATES:
        if name in last:
            found |= {"rate": last[name], "rate_unit": unit}
    if state == "running":
        paces = [line["seconds"] for line in lines[-20:] if isinstance(line.get("seconds"), int | float)]
        if paces:
            found["left_seconds"] = statistics.median(paces) * (steps - last["step"])
    return found


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a JSONL file, without incomplete ones."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _until(moment: str) -> float | None:
    try:
        return max(0.0, datetime.fromisoformat(moment).timestamp() - time.time())
    except ValueError:
        return None


# ---- what is printed -----------------------------------------------------------------------------------------------


def to_json(found: Sequence[StageRow]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in found], indent=1)


def table(found: Sequence[StageRow]) -> str:
    """The rows as a table; a stage's reason, if any, is on the line below it."""
    lines: list[str] = []
    run = None
    for row in found:
        if row.run != run:
            run = row.run
            lines.append(row.label or row.run)
        lines.append("  " + _line(row))
        if row.reason:
            lines.append(f"{'':<13}{row.reason}")
    return "\n".join(lines)


def _line(row: StageRow) -> str:
    parts = [f"{row.stage:<10} {row.state:<13}"]
    if row.job:
        parts.append(f"job {row.job}")
    if row.nodes:
        parts.append(f"on {row.nodes}")
    if row.step is not None and (row.step or row.state in ("running", "requeued")):
        parts.append(f"step {row.step}/{row.steps}")
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4f}")
    if row.rate is not None and row.state == "running":
        parts.append(f"{row.rate:,.0f} {row.rate_unit}")
    if row.left_seconds is not None:
        parts.append(f"left {clock(row.left_seconds)}")
    if row.limit_seconds is not None:
        parts.append(f"limit in {clock(row.limit_seconds)}")
    if row.tries > 1:
        parts.append(f"{row.tries} attempts")
    return "  ".join(parts).rstrip()
