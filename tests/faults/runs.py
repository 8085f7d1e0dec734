"""Run a stage with the real launcher and a fault in one rank, and inspect what the run left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import RunConfig, StageName
from lbr_dist.config.file import write_config
from lbr_dist.launch.local_ranks import run_stage
from tests.faults.worker import VARIABLE


def run(config: RunConfig, stage: StageName = "learn", ranks: int = 2, **fault: Any) -> None:
    """Run a stage on new ranks, with a fault in one of them; raises what the launcher raises."""
    path = config.run_path / "config.yaml"
    write_config(config, path)
    os.environ[VARIABLE] = json.dumps(fault or None)
    try:
        run_stage(stage, path, ranks, config.stage_path(stage) / "logs", worker="tests.faults.worker")
    finally:
        del os.environ[VARIABLE]


def checkpoints(config: RunConfig, stage: StageName = "learn") -> Checkpoints:
    return Checkpoints(config.stage_path(stage) / "checkpoints")


def losses(config: RunConfig, stage: StageName = "learn") -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step."""
    lines = (config.stage_path(stage) / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if row["step"]]


def assert_same_end(found: RunConfig, expected: RunConfig, stage: StageName = "learn") -> None:
    """The same losses at every step, and the same model, bit for bit."""
    assert losses(found, stage) == losses(expected, stage)
    models = [c.learn_export if stage == "learn" else c.model_path for c in (found, expected)]
    first, second = (load_file(folder / "model.safetensors") for folder in models)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def workers(run_path: Path) -> list[int]:
    """Processes on this machine that work for a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run_path / "config.yaml").encode() in words:
            found.append(int(process.name))
    return sorted(found)
