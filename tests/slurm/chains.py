"""Helpers for runs on the test bed: queue them, wait for them, and break them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lbr_dist.config import (
    CheckpointConfig,
    ClusterConfig,
    LearnConfig,
    OptimizerConfig,
    RepresentConfig,
    RunConfig,
    SlurmConfig,
    to_dict,
)
from lbr_dist.config.cluster import JobStage
from lbr_dist.slurm import journal
from lbr_dist.slurm.journal import Try
from lbr_dist.slurm.scheduler import OVER
from tests.configs import tiny_run

STEPS = 40
ODD = {"SQUEUE_PARTITION": "urgent", "SLURM_TIME_FORMAT": "relative", "SINFO_FORMAT": "%P"}
"""Variables that a user may have set for Slurm's commands, and that `lbr` must ignore."""

SLOW = (sys.executable, str(Path(__file__).with_name("slow_rank.py")))
"""Prefix of a rank's command: each training step takes longer, without using the CPU."""


def long_run(run_dir: Path, base: Path, files: Path, **slurm: Any) -> RunConfig:
    """Stage 1 only, on two nodes with one rank each, long enough to interrupt."""
    optimizer = OptimizerConfig(lr=3e-3)
    given = {"nodes": 2, "cpus_per_task": 1, "time_minutes": 10, "lead_seconds": 30, "wait_seconds": 15}
    config = tiny_run(
        run_dir,
        base,
        files,
        learn=LearnConfig(
            steps=STEPS, batch_texts=6, max_text_tokens=24, row_tokens=96, optimizer=optimizer, diagnose_every=1000
        ),
        represent=RepresentConfig(steps=0),
        checkpoint=CheckpointConfig(every_steps=5, keep=2),
        cluster=ClusterConfig(timeout_minutes=1.5),
        slurm=SlurmConfig(**(given | {"container": SLOW, "node_check": False} | slurm)),
    )
    return without_test(config)


def without_test(config: RunConfig) -> RunConfig:
    """The config of a run that ends with the export."""
    import dataclasses

    return dataclasses.replace(config, data=dataclasses.replace(config.data, test=None))


def write(config: RunConfig, path: Path) -> Path:
    """The config as a file that `lbr` reads."""
    path.write_text(yaml.safe_dump(to_dict(config), allow_unicode=True), encoding="utf-8")
    return path


ROOT = Path(__file__).parents[2]
SHELL: dict[str, str] = {}
"""The environment of a user of the test bed, set when it is up. The tests' own environment does not change."""


def slurm(*command: str, seconds: float = 60.0, **environment: str) -> str:
    """The output of a Slurm command."""
    env = SHELL | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done
    return done.stdout


def lbr(*arguments: str, seconds: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "lbr_dist.launch.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=SHELL | ODD | environment,
        cwd=ROOT,
        check=False,
    )


def submit(config: RunConfig, folder: Path, *arguments: str, **environment: str) -> dict[str, str]:
    """Queue a run. Returns its job ids by stage."""
    path = write(config, folder / "submitted.yaml")
    done = lbr("submit", str(path), *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(journal.submissions(config.run_path)[-1].jobs)


def rows(run: Path, **environment: str) -> list[dict[str, Any]]:
    """What `lbr status --json` prints for a run, or for each run of a sweep."""
    done = lbr("status", str(run), "--json", **environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def status(run: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """The same, by stage."""
    return {row["stage"]: row for row in rows(run, **environment)}


def forgotten(folder: Path, accounting: bool) -> dict[str, str]:
    """The environment of a user whose controller has forgotten all jobs, with or without accounting."""
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\n")
    (folder / "squeue").chmod(0o755)
    if accounting:
        (folder / "sacct").symlink_to(str(shutil.which("sacct", path=SHELL["PATH"])))
    return {"PATH": str(folder)}


def wait(what: str, ready: Callable[[], Any], run: Path, seconds: float = 240.0) -> Any:
    """Wait until something is true; otherwise fail, and show the run's logs."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what}\n{log_tails(run)}")
        time.sleep(0.5)
    return found


def wait_over(run: Path, seconds: float = 400.0) -> dict[str, dict[str, Any]]:
    """Wait until no job of a run is queued or running. Returns what `lbr status` says."""
    ids = ",".join(job for submission in journal.submissions(run) for job in submission.jobs.values())

    def ready() -> bool:
        command = ["squeue", "-h", "-r", "-t", "all", "-j", ids, "-o", "%T"]
        done = subprocess.run(command, env=SHELL, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode == 0 and all(state in OVER for state in done.stdout.split())

    wait("all jobs have ended", ready, run, seconds)
    return status(run)


def log_tails(run: Path) -> str:
    """The last lines of a run's logs."""
    parts = []
    for path in sorted([*run.glob("slurm/*.log"), *run.glob("*/logs/*.log"), *run.glob("slurm/*/*.log")]):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        parts.append("\n".join([f"==> {path.relative_to(run)}", *lines]))
    with contextlib.suppress(Exception):
        parts.append(json.dumps(status(run), indent=1))
    return "\n".join(parts)


def step(config: RunConfig, stage: JobStage = "learn") -> int:
    """The last step that a stage has logged."""
    try:
        lines = (config.run_path / stage / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def wait_step(config: RunConfig, at_least: int, stage: JobStage = "learn") -> None:
    """Wait until a stage has done at least this many steps."""
    wait(f"step {at_least}", lambda: step(config, stage) >= at_least, config.run_path)


def tries(config: RunConfig, stage: JobStage = "learn") -> list[Try]:
    return journal.tries(config.run_path, stage)


def outcomes(config: RunConfig, stage: JobStage = "learn") -> list[str]:
    return [each.outcome for each in tries(config, stage)]


def ranks(config: RunConfig, of: str = "") -> dict[int, int]:
    """Processes of a run's ranks on this machine, by rank; for a sweep, those whose config file has this name."""
    found: dict[int, int] = {}
    for process, words, environment in _processes():
        is_ours = (
            any(str(config.run_path) in word and word.endswith(of) for word in words)
            and "lbr_dist.launch.worker" in words
        )
        if is_ours and "SLURM_STEP_ID" in environment:
            found[int(environment["SLURM_PROCID"])] = process
    return found


def _processes() -> Iterator[tuple[int, list[str], dict[str, str]]]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            yield int(process.name), words, variables(int(process.name))


def variables(process: int) -> dict[str, str]:
    """The environment that a process was started with."""
    found = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(each.split("=", 1) for each in found if "=" in each)


def node_of(config: RunConfig, rank: int) -> str:
    """The name of a rank's node."""
    return variables(ranks(config)[rank])["SLURMD_NODENAME"]


def hosts(nodes: str) -> list[str]:
    """The node names in `n[1,3]`."""
    return slurm("scontrol", "show", "hostnames", nodes).split()


def send(config: RunConfig, rank: int, number: signal.Signals) -> None:
    """Send a signal to one rank of a run."""
    os.kill(ranks(config)[rank], number)
