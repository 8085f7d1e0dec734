"""A stage that is resumed ends as the one that was never interrupted: the same losses, bit for bit, the same model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbr_dist.config import CheckpointConfig, RunConfig
from tests.configs import tiny_run
from tests.distributed import on_ranks
from tests.ranks import RankPool


def losses(config: RunConfig, stage: str) -> list[tuple[int, float, float]]:
    lines = (config.run_path / stage / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if row["step"]]


@pytest.mark.parametrize("stage", ["learn", "represent"])
def test_resume(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, stage: str) -> None:
    whole = tiny_run(tmp_path / "whole", tiny_model, tiny_data)
    if stage == "represent":
        whole = dataclasses.replace(whole, learn=dataclasses.replace(whole.learn, steps=0))
    two_ranks.run(on_ranks.stage, config=whole, name=stage)
    broken = dataclasses.replace(whole, run_dir=str(tmp_path / "broken"))
    shutil.copytree(whole.run_path / stage, broken.run_path / stage)
    checkpoints = broken.run_path / stage / "checkpoints"
    shutil.rmtree(checkpoints / "step-000004")
    two_ranks.run(on_ranks.stage, config=broken, name=stage)
    assert [step for step, _, _ in losses(broken, stage)] == [1, 2, 3, 4]
    assert losses(broken, stage) == losses(whole, stage)
    export = "learn/export" if stage == "learn" else "model"
    first, second = (load_file(c.run_path / export / "model.safetensors") for c in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_world_size_is_refused(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tiny_model, tiny_data)
    folder = config.stage_path("learn") / "checkpoints"
    (folder / "step-000002").mkdir(parents=True)
    (folder / "latest.json").write_text(json.dumps({"tag": "step-000002", "step": 2, "world_size": 5}))
    with pytest.raises(AssertionError, match=r"written by 5 ranks, this run has 2.*--ranks 5"):
        two_ranks.run(on_ranks.stage, config=config, name="learn")


def test_old_checkpoints_go(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    keep_one = CheckpointConfig(every_steps=1, keep=1)
    config = tiny_run(tmp_path, tiny_model, tiny_data, checkpoint=keep_one)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    folder = config.stage_path("learn") / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-000004"]
    assert json.loads((folder / "latest.json").read_text())["step"] == 4
