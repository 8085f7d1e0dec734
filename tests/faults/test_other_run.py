"""A checkpoint of other settings, another tokenizer or other data is refused; settings that may change are accepted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lbr_dist.config import LoraConfig, RunConfig
from lbr_dist.data.token_cache.build import build
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, losses
from tests.faults.test_damaged import resume, stopped
from tests.ranks import RankPool

__all__ = ["stopped"]  # a fixture


def test_other_settings(two_ranks: RankPool, stopped: RunConfig) -> None:
    changed = dataclasses.replace(
        stopped, seed=7, learn=dataclasses.replace(stopped.learn, text_weight=0.5, row_tokens=200)
    )
    with pytest.raises(
        AssertionError, match=r"it differs in learn\.text_weight, seed\..*may differ: .*learn\.row_tokens"
    ):
        resume(two_ranks, changed)


def test_another_tokenizer(two_ranks: RankPool, stopped: RunConfig) -> None:
    """Under the same path, so that the config is the same."""
    tokenizer = Path(stopped.model.base) / "tokenizer.json"
    before = tokenizer.read_bytes()
    content = json.loads(before)
    content["model"]["vocab"] = dict(content["model"]["vocab"])
    tokenizer.write_text(json.dumps(content, indent=3))
    try:
        with pytest.raises(AssertionError, match=r"was saved with another tokenizer\.json in the folder"):
            resume(two_ranks, stopped)
    finally:
        tokenizer.write_bytes(before)


def test_other_data(two_ranks: RankPool, stopped: RunConfig, tmp_path: Path) -> None:
    """Under the same path: the next batch differs."""
    corpus = Path(stopped.data.corpus)
    before = corpus.read_bytes()
    corpus.write_text(corpus.read_text().replace("Abnormally", "Unusually"))
    try:
        with pytest.raises(AssertionError, match=r"the batch of step 5 is not the one it was .*the data has changed"):
            resume(two_ranks, dataclasses.replace(stopped, data=_cache(stopped, tmp_path / "cache")))
    finally:
        corpus.write_bytes(before)


def _cache(config: RunConfig, folder: Path) -> object:
    return dataclasses.replace(config.data, cache_dir=str(folder))


def test_other_workers_for_the_data(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig, tmp_path: Path) -> None:
    """Tokenised again, by another number of processes, into another folder: the same next sample."""
    build(Path(stopped.data.corpus), Path(stopped.model.base), tmp_path / "cache", 3, lambda message: None)
    resume(two_ranks, dataclasses.replace(stopped, data=_cache(stopped, tmp_path / "cache")))
    assert_same_end(stopped, whole)


def test_settings_that_change_no_result(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig) -> None:
    engine = dataclasses.replace(stopped.engine, live_elements=0, persistence_threshold=0, offload_optimizer="cpu")
    resume(two_ranks, dataclasses.replace(stopped, engine=engine))
    for found, expected in zip(losses(stopped), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_resumed_twice(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig) -> None:
    resume(two_ranks, stopped, resume=2)
    resume(two_ranks, stopped, resume=4)
    assert_same_end(stopped, whole)
    resume(two_ranks, stopped)  # already at its end: nothing is trained, the same model is exported
    assert_same_end(stopped, whole)


def test_other_base_weights_under_adapters(
    two_ranks: RankPool, tiny_model: Path, whole: RunConfig, tmp_path: Path
) -> None:
    """Adapters only fit the weights they were trained on; without adapters, all base weights are replaced anyway."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model = dataclasses.replace(whole.model, base=str(base), lora=LoraConfig(rank=2))
    config = dataclasses.replace(whole, run_dir=str(tmp_path / "run"), model=model)
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x01
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match=r"was saved with another model\.safetensors in the folder"):
        resume(two_ranks, config)
