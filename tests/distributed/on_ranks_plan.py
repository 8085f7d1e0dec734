"""What the planner's tests measure on every rank of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbr_dist.config import RunConfig
from lbr_dist.contrastive.chunks import share_out
from lbr_dist.data.packing import PackedRow, TrainingSequence, pack_row
from lbr_dist.data.pairs import load_pairs
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine
from lbr_dist.plan.cost import StepCost
from lbr_dist.plan.step import Batch
from lbr_dist.ranks.group import Ranks
from lbr_dist.represent import ContrastiveStep
from tests.distributed.on_ranks import open_engine


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _graph_bytes(engine: Engine, row: PackedRow) -> int:
    """Bytes that the graph of a chunk keeps, without parameters."""
    kept: dict[int, Tensor] = {}
    parameters = list(engine.model.parameters())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # gathered parameters get new storages each time
        if all(storage._cdata != p.untyped_storage()._cdata for p in parameters) and not hasattr(tensor, "ds_id"):
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = engine(row, task="embed", pooling="bottleneck_last")
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    engine.backward(output.sum() * 0.0)
    return found


def measure(ranks: Ranks, config: RunConfig, steps: int = 3) -> dict[str, Any]:
    """Memory and traffic of the last of a few steps, measured and planned."""
    engine, tokenizer = open_engine(ranks, config, "represent")
    engine.train()
    pairs = load_pairs(config, TextTokenizer(Path(config.model.base)))
    batch = pairs.batch(config.represent, 0, 0)
    step = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    values: dict[str, float] = {}
    for number in range(steps):
        ranks.traffic.take()
        values = step.accumulate([batch], str(number))
        engine.step(1e-3, 1e9)
    received = sum(count.within + count.between for count in ranks.traffic.take().values())
    zero = engine._engine.optimizer
    states = [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
    shared = share_out(batch, 4, step.planner.chunk_tokens, False, ranks.world_size)
    chunks, kept = int(values["chunks"]), int(values["kept_graphs"])
    rows = [sum(text >= len(batch.queries) for text in shared.members(rank)) for rank in range(ranks.world_size)]
    lengths = [5 + len(text) for text in batch.texts]
    planned = Batch(len(batch.queries), len(batch.documents), 0.0, 0.0)
    standing, _ = step.planner.standing(config, step.planner.sizes, ranks.world_size)
    chunk = pack_row([TrainingSequence(batch.texts[text], 4) for text in shared.rows[ranks.rank][0]], tokenizer.sink_id)
    with engine.accumulate():
        graph = _graph_bytes(engine, chunk)
    result = {
        "received": received,
        "received, planned": sum(
            t.total for t in StepCost(step.planner).traffic(chunks, kept, planned, max(rows)).values()
        ),
        "shards": _bytes(p.ds_tensor for p in engine.model.parameters()),
        "shards, planned": standing["parameters: shards"],
        "optimizer": _bytes([*zero.fp32_partitioned_groups_flat, *states]),
        "optimizer, planned": standing["optimizer: master weights and two moments"],
        "gradients": _bytes([zero.grad_partitions_flat_buffer]),
        "gradients, planned": standing["gradients: shards"],
        "graph": graph,
        "tokens": len(chunk.input_ids),
        "lengths": [lengths[text] for text in shared.rows[ranks.rank][0]],
        "passes": 3 * chunks - kept,
        "largest": max(p.ds_numel for p in engine.model.parameters()),
        "chunks": chunks,
        "kept": kept,
    }
    engine.close()
    return result
