"""Stage 1 on 1, 2, 3 and 4 real ZeRO-3 ranks equals one process; `test_contrastive.py` tests stage 2.

Tolerance, float32: the largest error of a gradient is at most 2e-5 of the largest element of that gradient.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lbr_dist.config import LearnConfig, LoraConfig, ModelConfig, RepresentConfig
from lbr_dist.data.packing import TrainingSequence
from lbr_dist.data.targets import LearnData
from lbr_dist.vocabulary.add import add_vocabulary
from tests import tiny
from tests.configs import tiny_run
from tests.distributed import on_ranks, single
from tests.ranks import RankPool

TOLERANCE = 2e-5


def assert_same(found: single.Gradients, expected: single.Gradients, without: tuple[str, ...] = ()) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        if name in without:
            assert found[name].abs().max() == 0 == gradient.abs().max()
            continue
        assert gradient.abs().max() > 0, f"{name} has no gradient: the test would check nothing"
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def learn_batch(tokenizer: object, learn: LearnConfig, k: int) -> list[TrainingSequence]:
    texts = tiny.pieces(tokenizer.encode(list(tiny.texts().values())), learn.max_text_tokens)  # type: ignore[attr-defined]
    return LearnData(texts, [], drop_id=1).batch(learn, k, step=0, seed=5)


def test_sharded_weights_equal_the_files(pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tiny_model, tiny_data)
    truth = load_file(tiny_model / "model.safetensors")
    reference, _ = single.model_of(config)
    for result in pool.run(on_ranks.weights, config=config):
        found = {n.removeprefix("backbone."): w for n, w in result["weights"].items() if n != "bottleneck"}
        assert set(found) == set(truth)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        assert torch.equal(result["weights"]["bottleneck"], reference.bottleneck)
        # rotary tables must stay exact, in float32, in the sharding context
        for name, buffer in reference.named_buffers():
            assert torch.equal(result["buffers"][name], buffer), name
        share = result["held"] / result["total"]
        assert share < 1.1 / pool.world_size + 0.02, "a rank holds more than its share of the weights"


@pytest.mark.parametrize("form", ["mask", "reinject", "none"])
def test_gradient_equals_one_process(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, form: str
) -> None:
    learn = LearnConfig(
        bottleneck=form,  # type: ignore[arg-type]
        batch_texts=13,
        max_text_tokens=40,
        row_tokens=192,
        text_weight=0.7,
    )
    k = 0 if form == "none" else 4
    config = tiny_run(tmp_path, tiny_model, tiny_data, learn=learn, model=_model(tiny_model, k), represent=_plain(k))
    model, tokenizer = single.model_of(config)
    sequences = learn_batch(tokenizer, learn, k)
    loss = single.learn_loss(model, sequences, tokenizer.sink_id, learn)
    expected = single.gradients(model, loss)
    for result in pool.run(on_ranks.learn_gradients, config=config, sequences=sequences):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)
        assert sorted(result["reduced"]) == sorted(set(result["reduced"])), "a gradient was reduced more than once"
        assert len(result["reduced"]) == len(expected), "a gradient was never reduced"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma3_text"])
def test_other_model_families(two_ranks: RankPool, tiny_data: Path, tmp_path: Path, family: str) -> None:
    """Sharded loading and stage 1's gradient for the other families; qwen2 with an untied LM head."""
    base = tiny.write_model(tmp_path / "base", family, tied=family != "qwen2")
    config = tiny_run(tmp_path, base, tiny_data)
    model, tokenizer = single.model_of(config)
    sequences = learn_batch(tokenizer, config.learn, 4)
    loss = single.learn_loss(model, sequences, tokenizer.sink_id, config.learn)
    expected = single.gradients(model, loss)
    for result in two_ranks.run(on_ranks.learn_gradients, config=config, sequences=sequences):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)


def test_a_grown_vocabulary(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A base model with domain words in its vocabulary: its tables are sharded and trained like any other."""
    base = tmp_path / "base"
    texts = [f"Glycerophospholipid hydroxylation of the {o}: {f}." for o in tiny.ORGANS for f in tiny.FAULTS]
    corpus = tmp_path / "words.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = add_vocabulary(tiny_model, [corpus], base, pieces=12, min_count=3)
    config = tiny_run(tmp_path / "run", base, tiny_data)
    model, tokenizer = single.model_of(config)
    ids = tokenizer.encode([*texts[::11], "Glycerol of the hydroxyl lipid."])
    sequences = [TrainingSequence(text, 4, text[::-1]) for text in ids]
    new = {token for s in sequences for token in s.context if token >= report.rows_before}
    assert new and report.rows_after == report.rows_before + 12
    loss = single.learn_loss(model, sequences, tokenizer.sink_id, config.learn)
    expected = single.gradients(model, loss)
    for result in two_ranks.run(on_ranks.learn_gradients, config=config, sequences=sequences):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)
        assert result["gradients"]["backbone.model.embed_tokens.weight"][sorted(new)].abs().amax(1).min() > 0


OBJECTIVES: dict[str, dict[str, Any]] = {
    "variational bottleneck": {"bottleneck": "reinject", "kl_weight": 0.3},
    "z-loss": {"bottleneck": "mask", "z_loss": 0.01},
    "z-loss in two passes": {"bottleneck": "reinject", "z_loss": 0.01},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_with_other_objectives(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, name: str
) -> None:
    learn = LearnConfig(batch_texts=13, max_text_tokens=40, row_tokens=192, **OBJECTIVES[name])
    config = tiny_run(tmp_path, tiny_model, tiny_data, learn=learn)
    model, tokenizer = single.model_of(config)
    single.stir(model.named_parameters())
    sequences = learn_batch(tokenizer, learn, 4)
    plain = dataclasses.replace(learn, kl_weight=0.0, z_loss=0.0)
    without = single.learn_loss(model, sequences, tokenizer.sink_id, plain, "noise")
    loss = single.learn_loss(model, sequences, tokenizer.sink_id, learn, "noise")
    assert abs(float((loss - without).detach())) > 0.1, "the term has no effect"
    expected = single.gradients(model, loss)
    for result in pool.run(on_ranks.learn_gradients, config=config, sequences=sequences):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradient_with_adapters(pool: RankPool, tiny_data: Path, tmp_path: Path, tied: bool) -> None:
    """With LoRA the gradients of adapters and bottleneck are exact, and nothing else has a gradient."""
    base = tiny.write_model(tmp_path / "base", tied=tied)
    lora = LoraConfig(rank=3, alpha=6.0)
    config = tiny_run(tmp_path, base, tiny_data, model=dataclasses.replace(_model(base, 4), lora=lora))
    model, tokenizer = single.model_of(config)
    single.stir(model.named_parameters())
    sequences = learn_batch(tokenizer, config.learn, 4)
    loss = single.learn_loss(model, sequences, tokenizer.sink_id, config.learn)
    expected = single.gradients(model, loss)
    assert len(expected) == 1 + 2 * 2 * len(lora.targets)  # the bottleneck, and A and B in each of two layers
    for result in pool.run(on_ranks.learn_gradients, config=config, sequences=sequences):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)


def _model(base: Path, k: int) -> ModelConfig:
    return ModelConfig(base=str(base), bottleneck_tokens=k, dtype="float32")


def _plain(k: int) -> RepresentConfig:
    pooling = "bottleneck_last" if k else "mean"
    return RepresentConfig(batch_pairs=11, chunk_tokens=96, pooling=pooling)  # type: ignore[arg-type]
