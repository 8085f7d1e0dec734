"""How far a stage of a run is, from the run folder. Imports no torch."""

from __future__ import annotations

import json

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import STAGES, RunConfig
from lbr_dist.config.cluster import JobStage
from lbr_dist.export import checksums


def wanted(config: RunConfig) -> list[JobStage]:
    """The stages that a run consists of, in order."""
    stages: list[JobStage] = [stage for stage in STAGES if config.stage(stage).steps]
    return [*stages, "evaluate"] if config.data.test is not None else stages


def saved_step(config: RunConfig, stage: JobStage) -> int:
    """The step that a stage would resume from; 0 if it would start from scratch."""
    if stage == "evaluate":
        return 0
    return max(Checkpoints(config.stage_path(stage) / "checkpoints").steps(), default=0)


def is_finished(config: RunConfig, stage: JobStage) -> bool:
    """Whether there is nothing left to do for a stage."""
    if stage == "evaluate":
        return _is_evaluated(config)
    return checksums.is_finished(config, stage)


def _is_evaluated(config: RunConfig) -> bool:
    """Whether the report is there, and is that of the model as it is now."""
    metrics, model = config.report_path / "metrics.json", config.evaluated_path
    found = checksums.identity(model)
    if found is None or not (config.report_path / "index.html").exists():
        return False
    try:
        evaluated = json.loads(metrics.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        return False
    if evaluated is None:  # a report of an earlier version
        return metrics.stat().st_mtime >= (model / "lbr.json").stat().st_mtime
    return bool(evaluated == found)
