"""What both stages share: the engine around their model, and the loop of steps, log, checkpoints and summary."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from lbr_dist import checkpoint
from lbr_dist.config import OptimizerConfig, RunConfig
from lbr_dist.distributed import Ranks, total
from lbr_dist.engine import Engine, sharded_init
from lbr_dist.metrics import MetricsLog
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.model.tokens import TextTokenizer

SUMMARY = "summary.json"
Stage = Literal["learn", "represent"]


def load_engine(
    config: RunConfig, folder: Path, tokenizer: TextTokenizer, optimizer: OptimizerConfig
) -> tuple[Engine, LBRModel]:
    """The model of `folder`, sharded as it is built, under the engine; the bottleneck at its own learning rate."""
    sharding = sharded_init(config.engine, config.model.dtype)
    model = load_model(config.model, folder, tokenizer, config.seed, sharding)
    return Engine(model, config.engine, optimizer, config.model.dtype, fast=model.fast_parameters), model


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (counted from 0): a linear rise, then `optimizer.schedule` down to a tenth of the peak."""
    warmup = math.ceil(optimizer.warmup_fraction * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    if optimizer.schedule == "constant":
        return optimizer.lr
    return optimizer.lr * (0.1 + 0.9 * shape[optimizer.schedule])


def train(
    stage: Stage,
    config: RunConfig,
    ranks: Ranks,
    engine: Engine,
    run_step: Callable[[int], dict[str, float]],
) -> None:
    """Run a stage's steps, from its newest checkpoint on.

    Args:
        stage: `learn` or `represent`.
        config: the run.
        ranks: this process among its peers.
        engine: the model and its optimizer.
        run_step: accumulates the gradients of the step of this number (from 0) and returns what to log; the
            same on every rank.
    """
    settings = config.learn if stage == "learn" else config.represent
    folder = config.stage_path(stage)
    checkpoints = folder / "checkpoints"
    first = checkpoint.resume(engine, checkpoints, ranks, config.checkpoint)
    engine.train()
    with MetricsLog(folder, stage, settings.steps, start_step=first) if ranks.is_first else nullcontext() as log:
        for step in range(first, settings.steps):
            began = time.perf_counter()
            values = run_step(step)
            rate = learning_rate(settings.optimizer, step, settings.steps)
            norm = engine.step(rate)
            seconds = time.perf_counter() - began
            throughput = {
                name.replace("num_", "") + "_per_second": values.pop(name) / seconds
                for name in ("num_tokens", "num_pairs")
                if name in values
            }
            if log is not None:
                log.log(step + 1, **values, lr=rate, grad_norm=norm, seconds=seconds, **throughput)
            done = step + 1
            if done % config.checkpoint.every_steps == 0 or done == settings.steps:
                checkpoint.save(engine, checkpoints, done, ranks, config.checkpoint)


def write_summary(folder: Path, config: RunConfig, ranks: Ranks, seconds: float) -> None:
    """Say that the stage is finished, and what it took: the last thing a stage does."""
    peak = total([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024], ranks.device)[0]
    if ranks.is_first:
        content = {
            "world_size": ranks.world_size,
            "zero_stage": config.engine.zero_stage,
            "seconds": round(seconds, 1),
            "peak_rss_bytes": int(peak),
        }
        checkpoint.write_atomic(folder / SUMMARY, json.dumps(content, indent=2) + "\n")
