"""What the distributed tests run on every rank of a pool. Functions return plain tensors and numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from lbr_dist import learn, represent
from lbr_dist.config import RunConfig, StageName
from lbr_dist.data.packing import TrainingSequence, rank_rows
from lbr_dist.data.targets import LearnData
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine
from lbr_dist.heldout.texts import Diagnostics
from lbr_dist.model.bottleneck import LossWeights
from lbr_dist.model.sharding import full_shape, whole
from lbr_dist.ranks.group import Ranks
from lbr_dist.trainer import load_engine
from tests.distributed import single


def open_engine(ranks: Ranks, config: RunConfig, stage: StageName = "learn") -> tuple[Engine, TextTokenizer]:
    tokenizer = TextTokenizer(Path(config.model.base))
    kind = learn.Learn if stage == "learn" else represent.Represent
    engine, _ = load_engine(kind, config, Path(config.model.base), tokenizer, ranks)
    return engine, tokenizer


def weights(ranks: Ranks, config: RunConfig) -> dict[str, Any]:
    """Every weight, gathered; and how many elements this rank holds itself."""
    engine, _ = open_engine(ranks, config)
    gathered = {}
    for name, parameter in engine.model.named_parameters():
        with whole(parameter) as value:
            gathered[name] = value.detach().clone()
    held = sum(p.ds_tensor.numel() for p in engine.model.parameters() if hasattr(p, "ds_tensor"))
    total = sum(full_shape(p).numel() for p in engine.model.parameters())
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    engine.close()
    return {"weights": gathered, "held": held, "total": total, "buffers": buffers}


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    trained = ((name, p) for name, p in engine.model.named_parameters() if p.requires_grad)
    return {name: safe_get_full_grad(p).clone() for name, p in trained}


def count_reductions(engine: Engine) -> list[int]:
    """A list that gets the id of each parameter whose gradient DeepSpeed queues for reduction from now on."""
    optimizer = engine._engine.optimizer
    name = "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket"
    original = getattr(optimizer, name)
    reduced: list[int] = []

    def counted(parameter: Any) -> Any:
        reduced.append(parameter.ds_id)
        return original(parameter)

    setattr(optimizer, name, counted)
    return reduced


def learn_gradients(ranks: Ranks, config: RunConfig, sequences: list[TrainingSequence]) -> dict[str, Any]:
    """Stage 1's gradient for one global batch, the logged values, and the ids of the reduced parameters."""
    engine, tokenizer = open_engine(ranks, config)
    engine.train()
    single.stir(engine.model.named_parameters())
    reduced = count_reductions(engine)
    values = learn.accumulate_step(engine, sequences, config.learn, tokenizer.sink_id, ranks, noise_key="noise")
    result = {"values": values, "gradients": gradients(engine), "reduced": reduced}
    engine.close()
    return result


def stage(ranks: Ranks, config: RunConfig, name: str) -> bool:
    """Run a whole stage."""
    (learn.learn if name == "learn" else represent.represent)(config, ranks)
    return True


def bad_steps(ranks: Ranks, config: RunConfig, sequences: list[TrainingSequence], bad: bool) -> dict[str, Any]:
    """Three updates; if `bad`, with NaN gradients on one rank and one too large gradient between them.

    Returns the final weights; and for each update its gradient norm, and whether it was applied.
    """
    engine, tokenizer = open_engine(ranks, config)
    engine.train()
    updates = []

    def update(factor: float, largest_norm: float) -> None:
        with engine.accumulate():
            rows, _ = rank_rows(sequences, config.learn.row_tokens, tokenizer.sink_id, ranks.rank, ranks.world_size)
            for row in rows:
                loss, _ = engine(row, task="learn", form="mask", weights=LossWeights(1.0, 1.0))
                engine.backward(loss * (factor if ranks.rank == ranks.world_size - 1 else 1.0))
        result = engine.step(1e-3, largest_norm)
        updates.append((result.grad_norm, result.applied))

    update(1.0, math.inf)
    if bad:
        update(math.nan, math.inf)
        update(math.nan, 1e9)
        update(1e6, 1e5)
    update(1.0, 1e5)
    update(1.0, math.inf)
    result = {"updates": updates, "weights": {}}
    for name, parameter in engine.model.named_parameters():
        with whole(parameter) as value:
            result["weights"][name] = value.detach().clone()
    engine.close()
    return result


def head_gathers(ranks: Ranks, config: RunConfig, sequences: list[TrainingSequence]) -> tuple[int, int, int]:
    """The number of rows in a step, and how often the LM head is gathered in each of two steps."""
    engine, tokenizer = open_engine(ranks, config)
    engine.train()
    head = engine.model.language_loss.weight
    gathered: list[int] = []

    def counted(original: Any) -> Any:
        def gather(parameters: Any = None, *args: Any, **kwargs: Any) -> Any:
            gathered.extend(1 for p in (parameters or ()) if p is head)
            return original(parameters, *args, **kwargs)

        return gather

    for parameter in engine.model.parameters():
        for name in ("all_gather", "all_gather_coalesced"):
            setattr(parameter, name, counted(getattr(parameter, name)))
    counts = []
    for _ in range(2):
        learn.accumulate_step(engine, sequences, config.learn, tokenizer.sink_id, ranks)
        engine.step(1e-3)
        counts.append(len(gathered))
        gathered.clear()
    engine.close()
    rows, _ = rank_rows(sequences, config.learn.row_tokens, tokenizer.sink_id, ranks.rank, ranks.world_size)
    return len(rows), counts[0], counts[1]


def diagnose(ranks: Ranks, config: RunConfig, held_out: list[tuple[int, ...]]) -> dict[str, float]:
    """Stage 1's held-out measurements of the untrained model."""
    engine, tokenizer = open_engine(ranks, config)
    engine.train(False)
    data = LearnData([], [], tokenizer.drop_id, held_out)
    values = Diagnostics(engine, data, config, tokenizer.sink_id, ranks).measure()
    engine.close()
    return values
