"""What the tests of stage 2 run on every rank of a pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lbr_dist import represent
from lbr_dist.config import RunConfig
from lbr_dist.contrastive.exchange import Exchange, Route
from lbr_dist.data.pairs import PairBatch, load_with_dev
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine
from lbr_dist.errors import RefusedStep, TrainingError
from lbr_dist.heldout.pairs import DevPairs
from lbr_dist.model.sharding import whole
from lbr_dist.ranks.group import Ranks
from lbr_dist.ranks.traffic import Traffic
from lbr_dist.represent import ContrastiveStep
from tests.distributed import single
from tests.distributed.on_ranks import count_reductions, gradients, open_engine

LEARNED = 0.3
"""Added to the temperature's logarithm, as if it had been trained."""

Break = Callable[[], Callable[[], None]]
"""Breaks a rule of exactness, and returns a function that restores it."""


def represent_gradients(
    ranks: Ranks,
    config: RunConfig,
    batches: list[PairBatch],
    local_world_size: int | None = None,
    broken: Break | None = None,
) -> dict[str, Any]:
    """Stage 2's gradient for one step, the logged values, and the ids of the reduced parameters."""
    if local_world_size is not None:
        ranks = replace(ranks, local_world_size=local_world_size, traffic=Traffic(local_world_size))
    engine, tokenizer = open_engine(ranks, config, "represent")
    engine.train()
    single.stir(engine.model.named_parameters())
    reduced = count_reductions(engine)
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    ranks.traffic.take()
    restore = broken() if broken else lambda: None
    try:
        values = step.accumulate(batches, "key")
    finally:
        restore()
    result = {"values": values, "gradients": gradients(engine), "reduced": reduced, "traffic": ranks.traffic.take()}
    engine.close()
    return result


def refused(ranks: Ranks, config: RunConfig, batch: PairBatch, value: float | None) -> tuple[str, dict[str, Any]]:
    """The error message of a step in which the last rank's first representation is `value`, and the gradient of the
    next step. With None, that first step is left out."""
    engine, tokenizer = open_engine(ranks, config, "represent")
    engine.train()
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    message = ""
    if value is not None:
        original = Engine.__call__

        def spoiled(self: Engine, *args: Any, **kwargs: Any) -> Any:
            vectors = original(self, *args, **kwargs)
            if ranks.rank == ranks.world_size - 1:
                vectors = torch.cat([torch.full_like(vectors[:1], value), vectors[1:]])
            return vectors

        Engine.__call__ = spoiled  # type: ignore[method-assign]
        try:
            step.accumulate([batch], "key")
        except RefusedStep as error:
            message = str(error)
        finally:
            Engine.__call__ = original  # type: ignore[method-assign]
        engine.discard()
    step.accumulate([batch], "key")
    found = gradients(engine)
    engine.close()
    return message, found


def disagree(ranks: Ranks, config: RunConfig, batch: PairBatch) -> str:
    """The error message of a step for which one rank has a different batch."""
    engine, tokenizer = open_engine(ranks, config, "represent")
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    if ranks.rank == 1:
        batch = replace(batch, queries=batch.queries[::-1])
    try:
        step.accumulate([batch], "key")
    except TrainingError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def _dev_pairs(ranks: Ranks, config: RunConfig, engine: Engine, tokenizer: TextTokenizer, other: bool) -> DevPairs:
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    dev = load_with_dev(config, tokenizer)[1]
    if other:
        assert dev is not None
        dev = replace(dev, pairs=dev.pairs[1:])
    return DevPairs(engine, dev, config, tokenizer.sink_id, step.exchange, step.planner.chunk_tokens)


def measure_dev(ranks: Ranks, config: RunConfig) -> dict[str, float] | None:
    """Stage 2's measurements on the dev pairs, taken twice with the same result; None without dev pairs.

    The model is untrained, except for a temperature whose logarithm has moved by `LEARNED`.
    """
    engine, tokenizer = open_engine(ranks, config, "represent")
    engine.train(False)
    if config.represent.learn_temperature:
        with whole(engine.model.log_temperature, write=True) as value:  # type: ignore[arg-type]
            value.add_(LEARNED)
    dev = _dev_pairs(ranks, config, engine, tokenizer, other=False)
    values = dev.measure() if dev else None
    assert values is None or dev.measure() == values
    engine.close()
    return values


def modes_when_measured(ranks: Ranks, config: RunConfig) -> list[bool]:
    """Run the whole stage. Returns whether the model was in training mode at each measurement of the dev pairs."""
    original, modes = DevPairs.measure, []

    def measure(self: DevPairs) -> dict[str, float]:
        modes.append(self.engine.model.training)
        return original(self)

    DevPairs.measure = measure  # type: ignore[method-assign]
    try:
        represent.represent(config, ranks)
    finally:
        DevPairs.measure = original  # type: ignore[method-assign]
    return modes


def disagree_on_dev(ranks: Ranks, config: RunConfig) -> str:
    """The error message if one rank lacks one of the dev pairs."""
    engine, tokenizer = open_engine(ranks, config, "represent")
    try:
        _dev_pairs(ranks, config, engine, tokenizer, other=ranks.rank == 1)
    except TrainingError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def gather_and_reduce(
    ranks: Ranks, counts: list[int], local_world_size: int, route: Route
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gathered rows that hold their rank's number, a reduced gradient of row numbers times ranks, and the bytes from
    other nodes."""
    ranks = replace(ranks, local_world_size=local_world_size, traffic=Traffic(local_world_size))
    exchange = Exchange(ranks, route)
    gathered = exchange.gather(torch.full((counts[ranks.rank], 3), float(ranks.rank)), counts)
    gradient = torch.arange(float(sum(counts)))[:, None].repeat(1, 3) * (ranks.rank + 1)
    reduced = exchange.reduce(gradient, counts)
    return gathered, reduced, sum(count.between for count in ranks.traffic.take().values())


def stage(ranks: Ranks, config: RunConfig, spoil: int = -1) -> bool:
    """Run the whole stage; in step number `spoil`, one rank's representations are NaN."""
    original = ContrastiveStep.accumulate

    def accumulate(self: ContrastiveStep, batches: list[PairBatch], key: str) -> dict[str, float]:
        call = Engine.__call__
        if key.endswith(f"/{spoil}") and ranks.rank == 1:
            Engine.__call__ = lambda *args, **kwargs: call(*args, **kwargs) * math.nan  # type: ignore[method-assign]
        try:
            return original(self, batches, key)
        finally:
            Engine.__call__ = call  # type: ignore[method-assign]

    ContrastiveStep.accumulate = accumulate  # type: ignore[method-assign]
    try:
        represent.represent(config, ranks)
    finally:
        ContrastiveStep.accumulate = original  # type: ignore[method-assign]
    return True
