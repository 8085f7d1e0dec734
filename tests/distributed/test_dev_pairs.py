"""What stage 2 measures on dev pairs equals plain PyTorch, one text at a time, at 1, 2, 3 and 4 ranks; and measuring
does not change the training."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import LoraConfig, OptimizerConfig, RunConfig
from lbr_dist.data.pairs import PairBatch, load_with_dev
from lbr_dist.heldout.pairs import ranks_of_positives
from tests import tiny
from tests.distributed import on_ranks_represent as on_ranks
from tests.distributed import single
from tests.distributed.test_contrastive import setting
from tests.distributed.test_represent import entries
from tests.ranks import RankPool

CASES: dict[str, dict[str, Any]] = {
    "chunks of two texts": {},
    "more ranks than chunks": {"chunk_tokens": 4096, "hard_negatives": 0},
    "one pair in the last batch": {"batch_pairs": 9},
    "all at once": {
        "symmetric": True,
        "margin": 0.1,
        "prefixes": (8, 20),
        "learn_temperature": True,
        "temperature": 0.07,
        "separate_sides": True,
    },
}


def with_dev(config: RunConfig, path: Path) -> RunConfig:
    """The run with 19 dev pairs at `path`: the tiny test pairs, one query three more times, one with two answers."""
    rows = tiny.pairs()[:16]
    rows[3]["positive_ids"] = ["d3", "d5"]
    rows += [rows[7] | {"id": f"again{i}", "positive_ids": [f"d{i}"]} for i in (20, 40, 60)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dev=str(path)))


def places(queries: Tensor, documents: Tensor, batch: PairBatch) -> list[int]:
    """The rank of each query's own document by similarity, without the other documents that answer the query."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    found = []
    for row, (own, *known) in enumerate(batch.positives):
        ranked = sorted(set(range(len(documents))) - set(known), key=lambda column: -float(cosines[row, column]))
        found.append(1 + ranked.index(own))
    return found


@pytest.fixture(scope="module")
def truths(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RunConfig, dict[str, float]]]:
    """The run of each case, and what one process measures, computed once for all numbers of ranks."""

    @functools.cache
    @torch.no_grad()
    def truth(name: str) -> tuple[RunConfig, dict[str, float]]:
        folder = tmp_path_factory.mktemp("run")
        config = with_dev(setting(tiny_model, tiny_data, folder, {}, **CASES[name]), folder / "dev.jsonl")
        settings, (model, tokenizer) = config.represent, single.model_of(config)
        if model.log_temperature is not None:
            model.log_temperature += on_ranks.LEARNED
        dev = load_with_dev(config, tokenizer)[1]
        assert dev is not None
        batches = dev.once(settings, config.seed)
        assert len(batches) > 1 and len(batches[-1].queries) < len(batches[0].queries)
        assert any(len(columns) > 1 for batch in batches for columns in batch.positives), "nothing is masked"
        losses, ranked = [], []
        for batch in batches:
            loss = single.represent_loss(model, batch, tokenizer.sink_id, settings)
            losses += [float(loss)] * len(batch.queries)
            queries, documents = (
                torch.stack([single.embed(model, text, tokenizer.sink_id, settings.pooling) for text in side])
                for side in (batch.queries, batch.documents)
            )
            width = max(settings.prefixes, default=queries.shape[1])
            ranked += places(queries[:, :width], documents[:, :width], batch)
        assert len(ranked) == 19 and min(ranked) == 1 and max(ranked) > 10
        return config, {
            "heldout_loss": sum(losses) / 19,
            "heldout_accuracy": ranked.count(1) / 19,
            "heldout_mrr": sum(1 / place for place in ranked if place <= 10) / 19,
        }

    return truth


@pytest.mark.parametrize("name", CASES)
def test_measurements_equal_one_process(
    pool: RankPool, truths: Callable[[str], tuple[RunConfig, dict[str, float]]], name: str
) -> None:
    config, expected = truths(name)
    assert len(set(expected.values())) == 3
    for values in pool.run(on_ranks.measure_dev, config=config):
        assert values == pytest.approx(expected, rel=1e-5)


def test_nothing_is_measured_without_dev_pairs(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = setting(tiny_model, tiny_data, tmp_path, {})
    never = with_dev(setting(tiny_model, tiny_data, tmp_path, {}, diagnose_every=0), tmp_path / "dev.jsonl")
    for nothing in (config, never):
        assert two_ranks.run(on_ranks.measure_dev, config=nothing) == [None, None]


def test_ranks_with_different_dev_pairs_are_refused(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = with_dev(setting(tiny_model, tiny_data, tmp_path, {}), tmp_path / "dev.jsonl")
    for message in two_ranks.run(on_ranks.disagree_on_dev, config=config):
        assert "the ranks disagree on the dev pairs" in message and "same files" in message


def test_measuring_does_not_change_the_training(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The stage with and without dev pairs: every step is the same bit for bit, dropout included."""
    model = {"lora": LoraConfig(rank=2, dropout=0.2)}
    options: dict[str, Any] = {"steps": 5, "diagnose_every": 2, "learn_temperature": True, "symmetric": True}
    options["optimizer"] = OptimizerConfig(lr=3e-3, schedule="constant", warmup_fraction=0.0)
    without = setting(tiny_model, tiny_data, tmp_path / "without", model, **options)
    measured = with_dev(setting(tiny_model, tiny_data, tmp_path / "with", model, **options), tmp_path / "dev.jsonl")
    for config in (without, measured):
        two_ranks.run(on_ranks.stage, config=config)
    names = ("loss", "accuracy", "alignment", "uniformity", "grad_norm", "temperature")
    rows, plain = entries(measured), entries(without)
    assert [[row[name] for name in names] for row in rows[1:]] == [[row[name] for name in names] for row in plain]
    keys = {"heldout_loss", "heldout_accuracy", "heldout_mrr"}
    assert [row["step"] for row in rows if keys <= set(row)] == [0, 2, 4, 5]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and not any(keys & set(row) for row in plain)
    losses = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    assert len(set(losses)) == 4, "the current model is not the one that is measured"
    assert losses[-1] < losses[0], "the loss on the dev pairs does not fall"
    kept = Checkpoints(measured.stage_path("represent") / "checkpoints").complete()
    assert kept[-1].step == 5 and kept[-1].score == losses[-1]


def test_the_model_is_measured_in_evaluation_mode(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = with_dev(setting(tiny_model, tiny_data, tmp_path, {}, steps=2, diagnose_every=1), tmp_path / "dev.jsonl")
    assert two_ranks.run(on_ranks.modes_when_measured, config=config) == [[False] * 3] * 2


def test_ranks_of_positives() -> None:
    unit = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0], [0.0, 5.0]])
    queries = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # first; behind another positive; tied with its equal; last
    positives = torch.tensor([[0, -1], [1, 0], [4, -1], [0, -1]])
    assert ranks_of_positives(queries, unit, positives).tolist() == [1, 1, 2, 5]
    many = ranks_of_positives(queries.repeat(200, 1), unit, positives.repeat(200, 1))
    assert many.tolist() == [1, 1, 2, 5] * 200
    assert ranks_of_positives(queries[:0], unit, positives[:0]).shape == (0,)
    # if all vectors are the same, the positive ranks last
    assert ranks_of_positives(torch.ones(3, 2), torch.ones(9, 2), torch.arange(3)[:, None]).tolist() == [9] * 3
    lost = ranks_of_positives(torch.full((1, 2), math.nan), torch.ones(9, 2), torch.zeros(1, 1, dtype=torch.int64))
    assert lost.tolist() == [10]
