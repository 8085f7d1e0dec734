"""Stage 2 as a whole: what it refuses, what it logs, and how it resumes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import LoraConfig, OptimizerConfig, RunConfig
from lbr_dist.data.pairs import load_pairs
from tests.configs import tiny_run
from tests.distributed import on_ranks_represent as on_ranks
from tests.distributed import single
from tests.distributed.test_contrastive import setting
from tests.ranks import RankPool


def entries(config: RunConfig) -> list[dict[str, float]]:
    lines = (config.stage_path("represent") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_step_with_an_unusable_representation_is_skipped(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, value: float
) -> None:
    """All ranks refuse the step and name the text; the next step is not affected."""
    config = setting(tiny_model, tiny_data, tmp_path, {}, keep_graphs=2)
    _, tokenizer = single.model_of(config)
    batch = load_pairs(config, tokenizer).batch(config.represent, 0, seed=5)
    results = two_ranks.run(on_ranks.refused, config=config, batch=batch, value=value)
    (message, found), (other, _) = results
    assert message == other, "the ranks don't agree"
    names = {batch.name(text) for text in range(len(batch.texts))}
    assert any(name in message for name in names) and "represent: found" in message
    undisturbed = two_ranks.run(on_ranks.refused, config=config, batch=batch, value=None)[0][1]
    assert all(torch.equal(found[name], gradient) for name, gradient in undisturbed.items())


def test_ranks_with_different_batches_are_refused(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = setting(tiny_model, tiny_data, tmp_path, {})
    _, tokenizer = single.model_of(config)
    batch = load_pairs(config, tokenizer).batch(config.represent, 0, seed=5)
    for message in two_ranks.run(on_ranks.disagree, config=config, batch=batch):
        assert "the ranks disagree on the global batch" in message and "same files" in message


def test_every_step_logs_its_values(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = setting(tiny_model, tiny_data, tmp_path, {}, steps=4, learn_temperature=True, symmetric=True, grad_accum=2)
    two_ranks.run(on_ranks.stage, config=config, spoil=2)
    found = entries(config)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row.get("skipped") for row in found] == [None, None, 1, None]
    for row in (found[0], found[1], found[3]):
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["masked_negatives"] < 1
        assert 0 < row["alignment"] < 4 and -4 < row["uniformity"] < 0
        assert row["grad_norm"] > 0 and row["pairs_per_second"] > 0 and row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] > 2**27
        assert row["all_gather_calls"] >= 2 and row["reduce_scatter_calls"] >= 2 and row["all_reduce_calls"] >= 1
        sums = row["all_gather_bytes"] + row["reduce_scatter_bytes"] + row["all_reduce_bytes"]
        assert row["bytes_within_node"] == sums > 0 == row["bytes_between_nodes"]
        assert row["kept_graphs"] == 1 < row["chunks"]
        assert 0.01 <= row["temperature"] < 0.1


def test_a_resumed_stage_takes_the_same_batches(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Bit for bit: with a learned temperature, dropout in two passes, and other kept graphs after the restart."""
    model = {"lora": LoraConfig(rank=2, dropout=0.2)}
    optimizer = OptimizerConfig(lr=3e-3, schedule="constant", warmup_fraction=0.0)

    def run(folder: str, **represent: object) -> list[tuple[float, float]]:
        options = {"learn_temperature": True, "optimizer": optimizer} | represent
        config = setting(tiny_model, tiny_data, tmp_path / folder, model, **options)
        two_ranks.run(on_ranks.stage, config=config)
        return [(row["loss"], row["grad_norm"]) for row in entries(config)]

    whole = run("whole", steps=4)
    assert run("halves", steps=4) == whole and len(whole) == 4
    Checkpoints(tmp_path / "halves" / "represent" / "checkpoints").remove(4)
    assert run("halves", steps=4, keep_graphs=3) == whole


def test_the_loss_falls(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tiny_model, tiny_data)
    represent = dataclasses.replace(config.represent, steps=12, batch_pairs=24)
    learn = dataclasses.replace(config.learn, steps=0)
    config = dataclasses.replace(config, represent=represent, learn=learn)
    two_ranks.run(on_ranks.stage, config=config)
    found = entries(config)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
