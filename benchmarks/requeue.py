"""From the signal to the requeued job: how long a run on a cluster takes to stop, compared with its steps and its save.

    python benchmarks/requeue.py --config launch/configs/demo.yaml

Needs root: it starts a Slurm on this machine (`slurm/testbed/`), and stage 1 of the config runs on two of its nodes,
one rank each. After some steps, the job gets USR2, as Slurm sends it ahead of a time limit; the clock runs until Slurm
reports PENDING. This happens once per turn, then the run continues. The bound is two of its steps and one save, as the
run itself logged them: a step at the median, a save as the time between the last step's line and the published
checkpoint. It also times the commands that run on a login node, `lbr submit --dry-run` and `lbr status`, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import record

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config.file import read_config
from lbr_dist.slurm import journal, scheduler
from lbr_dist.slurm.testbed.bed import Bed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("launch/configs/demo.yaml"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps before the signal, in each turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lbr-requeue-", ignore_cleanup_errors=True) as name:
        bed = Bed(Path(name) / "bed")
        bed.up()
        os.environ.update(bed.environment)
        try:
            measure(args.config, Path(name) / "run", args.turns, args.steps)
        finally:
            bed.down()


def measure(path: Path, run: Path, turns: int, steps: int) -> None:
    given = [f"--run_dir={run}", "--slurm.nodes=2", "--slurm.cpus_per_task=1", "--represent.steps=0"]
    given += ["--learn.diagnose_every=1000", "--data.test=null", "--slurm.check_gpus=false"]
    lbr = [sys.executable, "-m", "lbr_dist.launch.cli"]
    dry = _timed([*lbr, "submit", str(path), *given, "--dry-run"])
    subprocess.run([*lbr, "submit", str(path), *given], check=True)
    config = read_config(path, given)
    job = journal.submissions(run)[-1].jobs["learn"]
    found: list[dict[str, float]] = []
    for turn in range(turns):
        first = _step(run)
        _until(lambda first=first: _step(run) >= first + steps)
        time.sleep(0.5 * _median_step(run))  # in the middle of a step
        began = time.monotonic()
        scheduler.command("scancel", "--signal=USR2", job)
        _until(lambda: scheduler.jobs([job])[job].state == "PENDING")
        seconds = time.monotonic() - began
        manifest = Checkpoints(config.stage_path("learn") / "checkpoints").folder(_step(run)) / "manifest.json"
        save = manifest.stat().st_mtime - (config.stage_path("learn") / "metrics.jsonl").stat().st_mtime
        row = {"seconds": seconds, "step_seconds": _median_step(run), "save_seconds": max(0.0, save)}
        row["share_of_bound"] = seconds / (2 * row["step_seconds"] + row["save_seconds"])
        print(f"turn {turn}: {json.dumps(row)}", flush=True)
        found.append(row)
    status = _timed([*lbr, "status", str(run)])
    subprocess.run([*lbr, "cancel", str(run)], check=True)
    result = {name: statistics.median(row[name] for row in found) for name in found[0]}
    result |= {"dry_run_seconds": dry, "status_seconds": status, "turns": turns}
    row = {"config": str(path), "ranks": 2} | {key: round(value, 3) for key, value in result.items()}
    record("requeue", row)
    print(json.dumps(row))


def _timed(command: list[str]) -> float:
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.monotonic() - began)
    return statistics.median(times)


def _rows(run: Path) -> list[dict[str, float]]:
    try:
        lines = (run / "learn" / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [row for row in map(json.loads, lines) if row["step"]]


def _step(run: Path) -> int:
    return int(_rows(run)[-1]["step"]) if _rows(run) else 0


def _median_step(run: Path) -> float:
    return statistics.median(row["seconds"] for row in _rows(run)[-8:])


def _until(ready: Callable[[], bool], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "no progress: look at the logs of the run"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
