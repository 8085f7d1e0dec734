"""Runs in `runs/` of the working folder, as commands and `lbr submit` leave them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.cluster import JobStage
from lbr_dist.config.file import write_config
from lbr_dist.errors import LaunchError
from lbr_dist.slurm.journal import Point, Submission
from lbr_dist.status import starts
from tests.configs import tiny_run


def make_run(name: str) -> RunConfig:
    config = tiny_run(Path("runs") / name, Path("base"), Path("data"))
    write_config(config, config.run_path / "config.yaml")
    return config


def stop(config: RunConfig, why: str, stages: Sequence[JobStage] = ("learn",)) -> None:
    with pytest.raises(LaunchError), starts.recorded(config.run_path, stages, ["learn", "c.yaml"]):
        raise LaunchError(why)


def submit(config: RunConfig) -> Submission:
    folder = config.run_path / "slurm" / "001"
    folder.mkdir(parents=True)
    write_config(config, folder / "config-0.yaml")
    found = Submission(folder, str(Path.cwd()), sys.executable, {}, (Point("", str(config.run_path.absolute())),))
    found.write()
    return found


def write_log(config: RunConfig, stage: str, rank: int, lines: Sequence[str], age: float = 0.0) -> Path:
    path = config.run_path / stage / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    os.utime(path, (time.time() - age,) * 2)
    return path
