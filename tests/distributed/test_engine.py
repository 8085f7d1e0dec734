"""Engine settings change only memory and speed; bad steps are skipped; the optimizer's groups and learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import EngineConfig, LearnConfig, LoraConfig, OptimizerConfig, RunConfig
from lbr_dist.data.packing import TrainingSequence
from lbr_dist.engine import Update, deepspeed_config, parameter_groups
from lbr_dist.errors import TrainingError
from lbr_dist.trainer import SpikeGuard, learning_rate
from tests import tiny
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


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "lora"])
def test_activation_checkpointing_changes_no_result(
    two_ranks: RankPool, plain: RunConfig, tmp_path: Path, rank: int
) -> None:
    """Also with dropout in the adapters: the recomputation must draw the same random numbers."""
    found = []
    for on in (False, True):
        lora = LoraConfig(rank=rank, dropout=0.2 if rank else 0.0)
        model = dataclasses.replace(plain.model, activation_checkpointing=on, lora=lora)
        config = dataclasses.replace(plain, run_dir=str(tmp_path / str(on)), model=model)
        two_ranks.run(on_ranks.stage, config=config, name="learn")
        found.append(losses(config))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_separate_corpus_for_stage_1(two_ranks: RankPool, plain: RunConfig, tmp_path: Path) -> None:
    """A folder of files without ids, in which some documents are empty or binary."""
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [*tiny.texts().values(), "", "\x00\x01binary"]
    for i, part in enumerate((texts[:50], texts[50:])):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    data = dataclasses.replace(plain.data, corpus="not read", learn_corpus=str(folder), cache_dir=str(tmp_path / "c"))
    config = dataclasses.replace(plain, run_dir=str(tmp_path / "run"), data=data)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    assert losses(config) == losses(plain), "the texts or their order differ"


def test_only_layers_with_adapters_change(two_ranks: RankPool, plain: RunConfig, tmp_path: Path) -> None:
    """After a whole stage with LoRA, the export differs from the base only in the layers with adapters."""
    model = dataclasses.replace(plain.model, lora=LoraConfig(rank=2, dropout=0.1, targets=("v_proj",)))
    config = dataclasses.replace(plain, run_dir=str(tmp_path), model=model)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    found = losses(config)
    assert found[-2] < found[0], "nothing was learned"
    base, weights = (
        load_file(Path(folder) / "model.safetensors") for folder in (config.model.base, config.learn_export)
    )
    assert set(weights) == set(base)
    changed = {n.split(".")[-2] for n in base if not torch.equal(weights[n][: len(base[n])], base[n])}
    assert changed == {"v_proj"}


SEQUENCES = [TrainingSequence((5, 6, 7, 8, 9 + i), 4, (20, 21 + i, 22)) for i in range(9)]


def test_steps_with_bad_gradients_are_skipped(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """If a gradient is not finite on one rank, or too large, all ranks skip the step, and it leaves no trace."""
    config = tiny_run(tmp_path, tiny_model, tiny_data)
    good, bad = (pool.run(on_ranks.bad_steps, config=config, sequences=SEQUENCES, bad=flag) for flag in (False, True))
    assert [applied for _, applied in good[0]["updates"]] == [True] * 3
    assert len({str(result["updates"]) for result in bad}) == 1, "the ranks don't agree"
    first, *skipped, second, third = bad[0]["updates"]
    assert [first, second, third] == good[0]["updates"]
    assert [applied for _, applied in skipped] == [False] * 3
    assert [math.isfinite(norm) for norm, _ in skipped] == [False, False, True]
    assert skipped[2][0] > 1e5 > second[0]
    for name, weight in good[0]["weights"].items():
        assert torch.equal(bad[0]["weights"][name], weight), name


@pytest.mark.parametrize("resident", [True, False])
def test_the_head_is_gathered_once_a_step(two_ranks: RankPool, tiny_data: Path, tmp_path: Path, resident: bool) -> None:
    base = tiny.write_model(tmp_path / "base", tied=False)
    engine = EngineConfig(persistence_threshold=0, live_elements=0, resident_head=resident)
    learn = LearnConfig(row_tokens=24, batch_texts=9, max_text_tokens=8)
    config = tiny_run(tmp_path / "run", base, tiny_data, engine=engine, learn=learn)
    for rows, first, second in two_ranks.run(on_ranks.head_gathers, config=config, sequences=SEQUENCES):
        assert rows >= 3
        if resident:
            # in the first step, DeepSpeed still records the order of modules, and may gather more often
            assert second == 1 and first <= rows + 1
        else:
            assert second >= rows, "the test sees no gather"


def test_spike_guard(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    guard = SpikeGuard(OptimizerConfig(spike_factor=4.0, most_skipped=3))
    for step in range(16):
        assert guard.largest_norm == math.inf, "too few norms so far"
        guard.observe(Update(1.0 + step % 3, True), "learn", step, checkpoints)
    assert guard.largest_norm == 8.0
    resumed = SpikeGuard(guard.optimizer, list(guard.norms))
    assert resumed.largest_norm == 8.0
    guard.observe(Update(50.0, False), "learn", 17, checkpoints)
    assert guard.largest_norm == 8.0, "a skipped step must not change the limit"
    guard.observe(Update(2.0, True), "learn", 18, checkpoints)
    guard.observe(Update(50.0, False), "learn", 19, checkpoints)
    guard.observe(Update(math.inf, False), "learn", 20, checkpoints)
    with pytest.raises(TrainingError, match=r"3 steps in a row were skipped, up to step 21; .* no checkpoint yet"):
        guard.observe(Update(50.0, False), "learn", 21, checkpoints)
    assert SpikeGuard(OptimizerConfig(spike_factor=0.0), [1.0] * 30).largest_norm == math.inf


def test_clipping_is_always_set() -> None:
    # by default DeepSpeed clips at 1.0
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
