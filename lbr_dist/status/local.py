"""The stages of a run that was started by a command, here or by any launcher. Imports no torch.

Whether it runs is known from its lock; why it stopped, from what its last start has recorded.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from lbr_dist.config.cluster import JobStage
from lbr_dist.config.file import read_config
from lbr_dist.errors import LaunchError
from lbr_dist.status import starts
from lbr_dist.status.rows import StageRow, progress, result
from lbr_dist.status.stages import is_finished, wanted
from lbr_dist.status.starts import Start
from lbr_dist.storage.lock import Holder, holder


def rows(run: Path) -> list[StageRow]:
    """The stages of a run.

    Raises:
        ConfigError: its config cannot be read.
    """
    run = run.absolute()
    config = dataclasses.replace(read_config(run / "config.yaml"), run_dir=str(run))
    start = starts.read(run)
    who: Holder | None = None
    unknown = ""
    try:
        who = holder(run)
    except LaunchError as error:
        unknown = error.reason
    found: list[StageRow] = []
    open_stage: JobStage | None = None
    for stage in wanted(config):
        finished = is_finished(config, stage)
        began = open_stage is None and (stage in start.stages if start else (run / stage / "metrics.jsonl").exists())
        row = StageRow(str(run), "", stage, "finished")
        if not finished and unknown:
            row = dataclasses.replace(row, state="unknown", reason=unknown)
        elif not finished and who is not None:
            row = _while_it_runs(row, start, who, open_stage)
        elif not finished:
            row = _after_it_ran(row, start, began)
        if row.state in ("running", "stopped"):
            open_stage = stage
        shown = progress(config, stage, row.state) if row.state not in ("not started", "waiting") else {}
        found.append(dataclasses.replace(row, **shown | (result(config, stage) if finished else {})))
    return found


def _while_it_runs(row: StageRow, start: Start | None, who: Holder, running: str | None) -> StageRow:
    if start is not None and row.stage not in start.stages:
        return dataclasses.replace(row, state="not started")
    if running:
        return dataclasses.replace(row, state="waiting", reason=f"for {running}")
    return dataclasses.replace(row, state="running", nodes=who.host)


def _after_it_ran(row: StageRow, start: Start | None, began: bool) -> StageRow:
    if not began or (start is not None and start.ended and not start.reason):
        return dataclasses.replace(row, state="not started")
    if start is None:
        again = f"lbr run {shlex.quote(str(Path(row.run) / 'config.yaml'))}"
        return dataclasses.replace(row, state="stopped", resume=again)
    return dataclasses.replace(row, state="stopped", reason=start.why, resume=start.again)
