"""Settings of the engine that must change memory and speed alone, and the optimizer's groups."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lbr_dist.config import EngineConfig, OptimizerConfig, RunConfig
from lbr_dist.engine import deepspeed_config, parameter_groups
from lbr_dist.trainer import learning_rate
from tests.configs import tiny_run
from tests.distributed import on_ranks
from tests.ranks import RankPool

SETTINGS: dict[str, dict[str, Any]] = {
    "optimizer on the CPU": {"offload_optimizer": "cpu"},
    "optimizer and parameters on the CPU": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "everything sharded, gathered again in backward": {"persistence_threshold": 0, "live_elements": 0},
    "a small reduce bucket": {"reduce_elements": 500},
}


def losses(config: RunConfig) -> list[float]:
    lines = (config.stage_path("learn") / "metrics.jsonl").read_text().splitlines()
    return [value for row in map(json.loads, lines) if row["step"] for value in (row["loss"], row["grad_norm"])]


@pytest.fixture(scope="module")
def plain(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    config = tiny_run(tmp_path_factory.mktemp("plain"), tiny_model, tiny_data)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    assert losses(config)[-2] < losses(config)[0], "nothing was learned"
    return config


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_no_result(two_ranks: RankPool, plain: RunConfig, tmp_path: Path, name: str) -> None:
    engine = EngineConfig(**SETTINGS[name])
    config = dataclasses.replace(plain, run_dir=str(tmp_path), engine=engine)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    assert losses(config) == pytest.approx(losses(plain), rel=1e-5)


def test_clipping_is_always_written_out() -> None:
    # DeepSpeed clips at 1.0 unless it is told
    assert deepspeed_config(EngineConfig(), "bfloat16", 0.0)["gradient_clipping"] == 0.0
    assert deepspeed_config(EngineConfig(), "bfloat16", 0.3)["gradient_clipping"] == 0.3


def test_parameter_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    fast = nn.Parameter(torch.zeros(2, 3))
    model.register_parameter("fast", fast)
    groups = parameter_groups(model, OptimizerConfig(lr=0.1, weight_decay=0.2, bottleneck_lr_factor=5.0), [fast])
    found = {(g["weight_decay"], g["lr_factor"]): {p.shape for p in g["params"]} for g in groups}
    assert found == {(0.2, 1.0): {(4, 3)}, (0.0, 1.0): {(4,)}, (0.0, 5.0): {(2, 3)}}


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_learning_rate(schedule: Any, last: float) -> None:
    optimizer = OptimizerConfig(lr=2.0, schedule=schedule, warmup_fraction=0.1)
    rates = [learning_rate(optimizer, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == rates[100] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 * last, rel=0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
