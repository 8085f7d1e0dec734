"""A row of `lbr status`: the state of one stage of a run, wherever it runs. Imports no torch."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config import RunConfig
from lbr_dist.config.cluster import JobStage
from lbr_dist.console import clock
from lbr_dist.status.stages import wanted

LIVING = ("running", "queued", "waiting", "requeued")
"""The states of a stage that has something to come."""

_TAIL_BYTES = 64 * 1024
_RATES = (("tokens_per_second", "tokens/s"), ("pairs_per_second", "pairs/s"))


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage of one run."""

    run: str
    label: str
    """In a sweep, the values of this run; otherwise empty."""

    stage: JobStage | Literal[""]
    """Empty if the run cannot be read."""

    state: str
    """`finished`, `running`, `waiting`, `unknown`; on this machine `stopped`, `not started`; under Slurm `queued`,
    `requeued`, `failed`, `cancelled`, `not submitted`."""

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

    resume: str = ""
    """The command that continues a stage that has stopped."""

    score: float | None = None
    """nDCG@10 of the finished model, on the row of the run's last stage; so are the next three."""

    score_interval: tuple[float, float] | None = None
    """Its 95 % interval."""

    model: str = ""
    report: str = ""


def progress(config: RunConfig, stage: JobStage, state: str) -> dict[str, Any]:
    """Step, loss, pace, and the time left at that pace, from the metrics: fields of a row."""
    if stage == "evaluate":
        return {}
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


def result(config: RunConfig, stage: JobStage) -> dict[str, Any]:
    """Model, score and report of a run whose last stage is this one, and finished: fields of that row."""
    if stage != wanted(config)[-1]:
        return {}
    found: dict[str, Any] = {"model": str(config.evaluated_path)}
    if stage != "evaluate":
        return found
    found["report"] = str(config.report_path / "index.html")
    name = "lbr" if config.represent.steps else "learn"
    try:
        values = json.loads((config.report_path / "metrics.json").read_text(encoding="utf-8"))["systems"][name]
        low, high = values["ndcg@10_interval"]
        return found | {"score": values["ndcg@10"], "score_interval": (low, high)}
    except (OSError, ValueError, KeyError, TypeError):  # not one of evaluate.systems
        return found


# ---- what is printed -----------------------------------------------------------------------------------------------


def to_json(found: Sequence[StageRow]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in found], indent=1)


def table(found: Sequence[StageRow]) -> str:
    """The rows as a table; a stage's reason, and what the run has given, are on the lines below it."""
    lines: list[str] = []
    run = None
    for row in found:
        if row.run != run:
            run = row.run
            lines.append(row.label or row.run)
        if row.stage:
            lines.append("  " + _line(row))
        lines += [f"{'':<13}{line}" for line in _below(row)]
    return "\n".join(lines)


def _below(row: StageRow) -> list[str]:
    lines = [row.reason] if row.reason else []
    if row.resume:
        lines.append(f"to resume  {row.resume}")
    if row.score is not None:
        low, high = row.score_interval or (row.score, row.score)
        lines.append(f"nDCG@10    {row.score:.3f} ({low:.3f} to {high:.3f})")
    return lines + [f"{name:<10} {value}" for name, value in (("model", row.model), ("report", row.report)) if value]


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
