"""Stage 2 on 1, 2, 3 and 4 real ZeRO-3 ranks equals one process with the whole batch.

Tolerance, float32: the largest error of a gradient is at most 2e-5 of the largest element of that gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_dist.config import DataConfig, EngineConfig, LearnConfig, LoraConfig, ModelConfig, RepresentConfig, RunConfig
from lbr_dist.contrastive.chunks import share_out
from lbr_dist.contrastive.grad_cache import seed_chunk
from lbr_dist.data.packing import TrainingSequence, pack_row
from lbr_dist.data.pairs import PairBatch, load_pairs
from tests import tiny
from tests.configs import tiny_run
from tests.distributed import on_ranks_represent as on_ranks
from tests.distributed import single
from tests.distributed.test_exactness import assert_same
from tests.ranks import RankPool

ROW = 56
"""Tokens of a chunk: about two texts."""


def crowded(batch: PairBatch) -> PairBatch:
    """The batch with what real batches contain: a query twice, a document that answers two queries, a query with two
    answers."""
    positives = list(batch.positives)
    positives[1] = (positives[0][0],)
    positives[2] = (positives[2][0], positives[3][0], positives[5][0])
    queries = list(batch.queries)
    queries[5] = queries[4]
    answers = {positives[4][0], positives[5][0]}
    for row in (4, 5):
        positives[row] = (positives[row][0], *sorted(answers - {positives[row][0]}))
    return dataclasses.replace(batch, queries=queries, positives=positives)


def sparse(batch: PairBatch) -> PairBatch:
    """Five texts, no two of which fit into a chunk of 30 tokens: unless there are one or five ranks, some ranks have
    one chunk less to run."""
    texts = [text for text in batch.texts if 10 <= len(text) <= 25][:5]
    assert len(texts) == 5
    names = [str(i) for i in range(5)]
    return PairBatch(texts[:3], texts[3:], [(0,), (1,), (0,)], names[:3], names[3:])


def setting(base: Path, data: Path, folder: Path, model: dict[str, Any], **settings: Any) -> RunConfig:
    """A run with 11 pairs per batch, one hard negative each, in chunks of `ROW` tokens by default."""
    defaults: dict[str, Any] = {"batch_pairs": 11, "hard_negatives": 1, "chunk_tokens": ROW, "keep_graphs": 1}
    section = RepresentConfig(**(defaults | settings))
    model_config = ModelConfig(**({"base": str(base), "bottleneck_tokens": 4, "dtype": "float32"} | model))
    longest = min(48, (section.chunk_tokens or ROW) - 1 - 4)
    files = DataConfig(
        corpus=str(data / "corpus.jsonl"),
        train=str(data / "train.jsonl"),
        query_prompt="find: ",
        max_query_tokens=min(24, longest),
        max_document_tokens=longest,
    )
    return tiny_run(folder, base, data, represent=section, model=model_config, data=files, learn=LearnConfig(steps=0))


CASES: dict[str, dict[str, Any]] = {
    "cached": {},
    "two graphs kept": {"keep_graphs": 2},
    "one pass": {"keep_graphs": 99},
    "everything in one chunk": {"chunk_tokens": 4096},
    "a rank without a chunk": {"chunk_tokens": 30, "keep_graphs": 2},
    "sides apart": {"separate_sides": True, "keep_graphs": 2},
    "mean of the bottleneck": {"pooling": "bottleneck_mean"},
    "mean of the text": {"pooling": "mean"},
    "margin": {"margin": 0.1},
    "both directions": {"symmetric": True, "margin": 0.1},
    "prefixes": {"prefixes": (8, 20, 32)},
    "learned temperature": {"learn_temperature": True, "temperature": 0.07},
    "all at once": {
        "symmetric": True,
        "margin": 0.2,
        "prefixes": (16, 32),
        "learn_temperature": True,
        "separate_sides": True,
        "keep_graphs": 2,
        "exchange": "flat",
    },
}


@dataclasses.dataclass
class Truth:
    """A case's batch, and its loss and gradient in one process."""

    config: RunConfig
    batch: PairBatch
    loss: float
    gradients: single.Gradients


@pytest.fixture(scope="module")
def truths(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    """The truth for each case, computed once for all numbers of ranks."""

    @functools.cache
    def truth(name: str) -> Truth:
        config = setting(tiny_model, tiny_data, tmp_path_factory.mktemp("run"), {}, **CASES[name])
        settings = config.represent
        model, tokenizer = single.model_of(config)
        drawn = load_pairs(config, tokenizer).batch(settings, 0, seed=5)
        assert len(drawn.documents) > 15 and min(map(len, drawn.texts)) < max(map(len, drawn.texts))
        batch = sparse(drawn) if name == "a rank without a chunk" else crowded(drawn)
        loss = single.represent_loss(model, batch, tokenizer.sink_id, settings)
        if settings.margin is not None:
            unmasked = dataclasses.replace(settings, margin=None)
            plain = single.represent_loss(model, batch, tokenizer.sink_id, unmasked)
            assert abs(float(plain.detach() - loss.detach())) > 1e-3, "the margin masks nothing"
        return Truth(config, batch, loss.item(), single.gradients(model, loss))

    return truth


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_one_process(pool: RankPool, truths: Callable[[str], Truth], name: str) -> None:
    truth = truths(name)
    settings = truth.config.represent
    plan = share_out(truth.batch, 4, settings.chunk_tokens or 0, settings.separate_sides, pool.world_size)
    if settings.chunk_tokens == ROW:
        assert len(plan.tokens) > 2, "too few chunks to need a cache"
    if name == "a rank without a chunk" and pool.world_size > 1:
        assert min(len(rows[-1]) for rows in plan.rows) == 0, "all ranks have a last chunk: lockstep is not tested"
    for result in pool.run(on_ranks.represent_gradients, config=truth.config, batches=[truth.batch]):
        values = result["values"]
        assert values["loss"] == pytest.approx(truth.loss, rel=1e-5)
        # the pooled states are the text's, which come before the bottleneck and never see it
        without = ("bottleneck",) if settings.pooling == "mean" else ()
        assert_same(result["gradients"], truth.gradients, without=without)
        reduced = result["reduced"]
        assert sorted(reduced) == sorted(set(reduced)), "a gradient was reduced more than once"
        assert len(reduced) == len(truth.gradients), "a gradient was never reduced"
        assert values["kept_graphs"] == min(len(plan.tokens), settings.keep_graphs)  # type: ignore[type-var]


def test_gradient_accumulation_is_the_mean_over_batches(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Gradient accumulation: the mean of whole contrastive batches' gradients, reduced once."""
    config = setting(tiny_model, tiny_data, tmp_path, {}, grad_accum=3)
    model, tokenizer = single.model_of(config)
    pairs = load_pairs(config, tokenizer)
    batches = [pairs.batch(config.represent, number, seed=5) for number in range(3)]
    losses = [single.represent_loss(model, batch, tokenizer.sink_id, config.represent) for batch in batches]
    loss = torch.stack(losses).mean()
    expected = single.gradients(model, loss)
    for result in pool.run(on_ranks.represent_gradients, config=config, batches=batches):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert result["values"]["num_pairs"] == 33
        assert_same(result["gradients"], expected)
        assert len(result["reduced"]) == len(set(result["reduced"])) == len(expected)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gathered again for each pass": ({}, {"persistence_threshold": 0, "live_elements": 0}),
    "activation checkpointing": ({"activation_checkpointing": True}, {}),
    "offload": ({}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "a small reduce bucket": ({}, {"reduce_elements": 500}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_engine_settings_change_no_gradient(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, name: str
) -> None:
    model_settings, engine = VARIANTS[name]
    config = setting(tiny_model, tiny_data, tmp_path, model_settings, keep_graphs=2)
    config = dataclasses.replace(config, engine=EngineConfig(**engine))
    model, tokenizer = single.model_of(config)
    batch = crowded(load_pairs(config, tokenizer).batch(config.represent, 0, seed=5))
    expected = single.gradients(model, single.represent_loss(model, batch, tokenizer.sink_id, config.represent))
    for result in two_ranks.run(on_ranks.represent_gradients, config=config, batches=[batch]):
        assert_same(result["gradients"], expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_adapters_and_their_dropout(
    pool: RankPool, tiny_data: Path, tmp_path: Path, tied: bool, checkpointing: bool
) -> None:
    """LoRA's dropout is the same in both passes. The truth is one graph over the same chunks with the same draws."""
    base = tiny.write_model(tmp_path / "base", tied=tied)
    lora = LoraConfig(rank=3, alpha=6.0, dropout=0.3)
    config = setting(base, tiny_data, tmp_path / "run", {"lora": lora, "activation_checkpointing": checkpointing})
    settings = config.represent
    model, tokenizer = single.model_of(config)
    single.stir(model.named_parameters())
    batch = crowded(load_pairs(config, tokenizer).batch(settings, 0, seed=5))
    vectors: dict[int, torch.Tensor] = {}
    plan = share_out(batch, 4, ROW, False, pool.world_size)
    for rank, rows in enumerate(plan.rows):
        for number, members in enumerate(rows):
            if members:
                seed_chunk(f"key/0/{rank}", number)
                row = pack_row([TrainingSequence(batch.texts[i], 4) for i in members], tokenizer.sink_id)
                vectors |= dict(zip(members, model(row, task="embed", pooling=settings.pooling), strict=True))
    ordered = torch.stack([vectors[text] for text in range(len(batch.texts))])
    queries, documents = ordered.split([len(batch.queries), len(batch.documents)])
    loss = single.contrastive_loss(queries, documents, batch, settings, settings.temperature)
    expected = single.gradients(model, loss)
    assert len(expected) == 1 + 2 * 2 * len(lora.targets)  # the bottleneck, and A and B in each of two layers
    for result in pool.run(on_ranks.represent_gradients, config=config, batches=[batch]):
        assert result["values"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same(result["gradients"], expected)


@pytest.mark.parametrize("route", ["flat", "two_level"])
@pytest.mark.parametrize("counts", [(3, 0, 2, 1), (2, 2, 2, 2)], ids=["uneven", "even"])
def test_rows_are_gathered_and_gradients_reduced(pool: RankPool, route: Any, counts: tuple[int, ...]) -> None:
    """On one node; with four ranks, on two nodes of two ranks."""
    mine = list(counts[: pool.world_size])
    local = 2 if pool.world_size == 4 else pool.world_size
    places = torch.arange(float(sum(mine)))[:, None].repeat(1, 3)
    factor = sum(range(1, pool.world_size + 1))
    expected = torch.cat([torch.full((n, 3), float(rank)) for rank, n in enumerate(mine)])
    results = pool.run(on_ranks.gather_and_reduce, counts=mine, local_world_size=local, route=route)
    for rank, (gathered, reduced, between) in enumerate(results):
        assert torch.equal(gathered, expected)
        assert torch.equal(reduced, (places * factor).split(mine)[rank])
        # rows have 12 bytes; each node receives them from both ranks of the other node, per rank or once per node
        most = max(mine)
        assert between == (0 if local == pool.world_size else 2 * 12 * most * (2 if route == "flat" else 1))


@pytest.mark.parametrize("pool", [4], indirect=True, ids=["4ranks"])
def test_two_levels_give_the_same_gradient(tiny_model: Path, tiny_data: Path, tmp_path: Path, pool: RankPool) -> None:
    """On two nodes with two ranks each."""
    config = setting(tiny_model, tiny_data, tmp_path, {}, exchange="auto", symmetric=True)
    model, tokenizer = single.model_of(config)
    batch = crowded(load_pairs(config, tokenizer).batch(config.represent, 0, seed=5))
    expected = single.gradients(model, single.represent_loss(model, batch, tokenizer.sink_id, config.represent))
    for result in pool.run(on_ranks.represent_gradients, config=config, batches=[batch], local_world_size=2):
        assert result["traffic"]["all_gather_into_tensor"].between > 0
        assert_same(result["gradients"], expected)


def test_the_number_of_kept_graphs_changes_no_bit(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """So a resumed run may plan differently from the run that saved the checkpoint."""
    found = []
    for kept in (1, 2, 99):
        config = setting(tiny_model, tiny_data, tmp_path, {}, keep_graphs=kept)
        _, tokenizer = single.model_of(config)
        batch = load_pairs(config, tokenizer).batch(config.represent, 0, seed=5)
        found.append(two_ranks.run(on_ranks.represent_gradients, config=config, batches=[batch])[0]["gradients"])
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_bfloat16(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """In bfloat16 the chunks' gradients are summed in bfloat16. The error of all gradients together against float32, as
    a share of their norm, is at most 0.03, and with many chunks at most 1.2 times that with one."""
    settings = {"batch_pairs": 80, "hard_negatives": 0}
    exact = setting(tiny_model, tiny_data, tmp_path, {}, chunk_tokens=30, **settings)
    model, tokenizer = single.model_of(exact)
    with torch.no_grad():  # round the weights to bfloat16, so that only the arithmetic differs
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    batch = load_pairs(exact, tokenizer).batch(exact.represent, 0, seed=5)
    expected = single.gradients(model, single.represent_loss(model, batch, tokenizer.sink_id, exact.represent))
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {}
    for chunk_tokens in (8192, 300, 60, 30):
        represent = dataclasses.replace(exact.represent, chunk_tokens=chunk_tokens)
        config = dataclasses.replace(
            exact, represent=represent, model=dataclasses.replace(exact.model, dtype="bfloat16")
        )
        result = two_ranks.run(on_ranks.represent_gradients, config=config, batches=[batch])[0]
        differences = [(result["gradients"][name].float() - g).norm() for name, g in expected.items()]
        errors[result["values"]["chunks"]] = float(torch.stack(differences).norm() / norm)
    print("chunks of a rank and error:", errors)
    assert min(errors) == 1 and max(errors) > 40
    assert min(errors.values()) > 0 and max(errors.values()) < 0.03
    assert max(errors.values()) < 1.2 * errors[1]
