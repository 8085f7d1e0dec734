"""A resumed stage ends like one that was never interrupted: with the same losses, bit for bit, and the same model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import CheckpointConfig, OptimizerConfig, RunConfig
from tests.configs import tiny_run
from tests.distributed import on_ranks
from tests.ranks import RankPool


def losses(config: RunConfig, stage: str) -> list[tuple[int, float, float]]:
    lines = (config.run_path / stage / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if row["step"]]


@pytest.mark.parametrize("stage", ["learn", "represent"])
def test_a_resumed_stage_equals_an_uninterrupted_one(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, stage: str
) -> None:
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


def test_old_checkpoints_are_removed(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    keep_one = CheckpointConfig(every_steps=1, keep=1)
    config = tiny_run(tmp_path, tiny_model, tiny_data, checkpoint=keep_one)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    folder = config.stage_path("learn") / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-000004"]
    assert json.loads((folder / "latest.json").read_text())["step"] == 4


def test_checkpoints_are_also_saved_by_time(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """A checkpoint is saved when `every_minutes` have passed since the last one, whatever `every_steps` is."""
    for minutes, steps in ((1e-6, [1, 2, 3, 4]), (None, [4])):
        settings = CheckpointConfig(every_steps=1000, every_minutes=minutes, keep=9)
        config = tiny_run(tmp_path / str(minutes), tiny_model, tiny_data, checkpoint=settings)
        two_ranks.run(on_ranks.stage, config=config, name="learn")
        assert Checkpoints(config.stage_path("learn") / "checkpoints").steps() == steps


def test_the_best_checkpoint_is_kept(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The one with the lowest held-out loss, which is measured for every checkpoint with `keep_best`."""
    optimizer = OptimizerConfig(lr=0.5, schedule="constant", warmup_fraction=0.0)  # so large that the loss rises
    settings = CheckpointConfig(every_steps=1, keep=1, keep_best=1)
    config = tiny_run(tmp_path, tiny_model, tiny_data, checkpoint=settings)
    config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, optimizer=optimizer))
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    rows = [json.loads(line) for line in (config.stage_path("learn") / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["heldout_target_loss"] for row in rows if row["step"]}
    assert len(scores) == 4
    best = min(scores, key=scores.__getitem__)
    assert best != 4, "the test needs a best checkpoint that is not the last"
    found = Checkpoints(config.stage_path("learn") / "checkpoints")
    assert {manifest.step: manifest.score for manifest in found.complete()} == {best: scores[best], 4: scores[4]}
