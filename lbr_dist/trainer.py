"""What both stages share: the engine around their model, the loop of steps, log and checkpoints, export and summary.

What differs is in a `Stage`: its data, its batch of a step, how that batch's gradient is accumulated, and what is
measured on held-out data. `run` does everything else.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.checkpoint.resume import on_first, resume
from lbr_dist.checkpoint.saver import Saver, base_identity
from lbr_dist.config import OptimizerConfig, RunConfig, StageName
from lbr_dist.console import Say, silent
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine, Update, sharded_init
from lbr_dist.errors import CheckpointError, Interrupted, RefusedStep, TrainingError
from lbr_dist.export.checksums import SUMMARY
from lbr_dist.export.folder import export, stage_settings
from lbr_dist.metrics import MetricsLog
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.ranks.group import Ranks, largest
from lbr_dist.ranks.hardware import peak_memory
from lbr_dist.ranks.interrupt import StopRequest, taking_stops
from lbr_dist.ranks.traffic import by_kind
from lbr_dist.storage.files import write_atomic

Batch = TypeVar("Batch")

SCORES = ("heldout_target_loss", "heldout_loss", "heldout_perplexity")
"""The measurement that ranks checkpoints: the first of these that was measured; lower is better."""


class Stage(ABC, Generic[Batch]):
    """One stage of the method on one rank. Building it reads the data: bad data is refused before a model loads.

    Args:
        config: the run.
        ranks: this process among its peers.

    Raises:
        DataError, ModelError: the data or the tokenizer cannot be used.
    """

    name: ClassVar[StageName]

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.settings = config.stage(self.name)
        self.tokenizer = TextTokenizer(config.stage_base(self.name))

    @classmethod
    def model_options(cls, config: RunConfig) -> dict[str, Any]:
        """What `load_model` is to add to the model for this stage."""
        return {}

    @classmethod
    def resident(cls, config: RunConfig, model: LBRModel) -> list[nn.Parameter]:
        """Parameters that stay whole on every rank, gathered once a step."""
        return []

    @abstractmethod
    def attach(self, engine: Engine) -> None:
        """Take the engine, once, before the first step. A collective."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The **global** batch of a step (counted from 0): the same on every rank, and after a resume."""

    @abstractmethod
    def digest(self, batch: Batch) -> str:
        """Tells this batch from any other, so that a resumed run continues with the very next one."""

    @abstractmethod
    def accumulate(self, batch: Batch, step: int) -> dict[str, float]:
        """Accumulate the gradient of the batch, reduced once. Returns what to log, the same on every rank.

        Raises:
            RefusedStep: the step cannot be taken, on any rank. Nothing of it may be applied.
        """

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Measure the model, in evaluation mode, on held-out data; empty if there is none. The same on every rank."""


def load_engine(
    stage: type[Stage[Any]], config: RunConfig, folder: Path, tokenizer: TextTokenizer, ranks: Ranks
) -> tuple[Engine, LBRModel]:
    """The model of `folder`, sharded as it is built, under the engine; the bottleneck at its own learning rate."""
    sharding = sharded_init(config.engine, config.model.dtype)
    model = load_model(config.model, folder, tokenizer, config.seed, sharding, **stage.model_options(config))
    optimizer, dtype = config.stage(stage.name).optimizer, config.model.dtype
    resident = stage.resident(config, model)
    return Engine(model, config.engine, optimizer, dtype, model.fast_parameters, resident, ranks.traffic), model


def run(stage: Stage[Any]) -> None:
    """Run a stage on every rank: load its model, train, export, write the summary.

    Raises:
        ModelError, CheckpointError, TrainingError, Interrupted: see the messages.
    """
    began = time.perf_counter()
    config, ranks = stage.config, stage.ranks
    engine, model = load_engine(type(stage), config, config.stage_base(stage.name), stage.tokenizer, ranks)
    stage.attach(engine)
    train(stage, engine)
    settings = stage_settings(config, stage.name)
    export(model, stage.tokenizer, settings, config, config.stage_export(stage.name), ranks)
    write_summary(config.stage_path(stage.name), config, ranks, time.perf_counter() - began)
    engine.close()


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (counted from 0): linear warm-up, then `optimizer.schedule` down to a tenth of the peak."""
    warmup = math.ceil(optimizer.warmup_fraction * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (step - warmup) / max(1, steps - warmup)
    left = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.lr * (0.1 + 0.9 * left)


class SpikeGuard:
    """Decides from the last gradient norms which gradients are too large to apply.

    Every rank sees the same norms, so all ranks decide alike.
    """

    HISTORY, ENOUGH = 64, 16

    def __init__(self, optimizer: OptimizerConfig, norms: Sequence[float] = (), skipped: int = 0) -> None:
        self.optimizer = optimizer
        self.norms = deque(norms, maxlen=self.HISTORY)
        self.skipped = skipped
        """Skipped steps in a row."""

    @property
    def largest_norm(self) -> float:
        """The largest norm to apply; infinite until enough norms are known."""
        if not self.optimizer.spike_factor or len(self.norms) < self.ENOUGH:
            return math.inf
        return self.optimizer.spike_factor * statistics.median(self.norms)

    def observe(self, update: Update, stage: StageName, step: int, checkpoints: Checkpoints) -> None:
        """Record what a step did.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        if update.applied:
            self.norms.append(update.grad_norm)
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped >= self.optimizer.most_skipped:
            found = checkpoints.complete()
            folder = checkpoints.folder(found[-1].step) if found else None
            last = f"The last good checkpoint is {folder}" if folder else "There is no checkpoint yet"
            raise TrainingError(
                f"{stage}: {self.skipped} steps in a row were skipped, up to step {step}; the last gradient norm is "
                f"{update.grad_norm:.3g}, expected a finite one of at most {self.largest_norm:.3g}. {last}. Lower "
                f"{stage}.optimizer.lr, or look at the data of these steps."
            )


def train(stage: Stage[Any], engine: Engine) -> None:
    """Run a stage's steps, from its newest checkpoint on.

    Raises:
        TrainingError: too many steps in a row were skipped.
        CheckpointError: the run cannot resume from its checkpoints, or the last one cannot be saved.
        Interrupted: a rank was asked to stop; the state is saved.
    """
    config, ranks, settings, name = stage.config, stage.ranks, stage.settings, stage.name
    folder = config.stage_path(name)
    checkpoints = Checkpoints(folder / "checkpoints")
    # full fine-tuning replaces all of the base's weights; adapters mean nothing without them
    base = on_first(lambda: base_identity(config.stage_base(name), weights=config.model.lora.rank > 0), ranks)
    state = resume(engine, checkpoints, ranks, config, base) or {"step": 0, "norms": [], "skipped": 0}
    first: int = state["step"]
    if first and state["next_batch"] != stage.digest(stage.batch(first)):
        raise CheckpointError(
            f"{checkpoints.folder(first)}: the batch of step {first + 1} is not the one it was when this was saved: "
            "the data has changed. Put back the files that the run began with, or start another run_dir."
        )
    guard = SpikeGuard(settings.optimizer, state["norms"], state["skipped"])
    engine.train()

    def measured(done: int, wanted: bool) -> dict[str, float]:
        every = settings.diagnose_every
        if not every or not (wanted or done % every == 0):
            return {}
        ranks.watchdog.beat(f"the measurements of step {done} of {name}")
        engine.train(False)
        values = stage.measure()
        engine.train()
        return values

    log_or_not = MetricsLog(folder, name, settings.steps, start_step=first) if ranks.is_first else nullcontext()
    stop = StopRequest()
    with log_or_not as log, taking_stops(stop.take):
        say: Say = log.say if log is not None else silent
        if first == 0 and settings.steps:
            values = measured(0, wanted=True)
            if log is not None and values:
                log.log(0, **values)
        with Saver(engine, checkpoints, ranks, config, name, base, say) as saver:
            saved = time.monotonic()
            for step in range(first, settings.steps):
                ranks.watchdog.beat(f"step {step + 1} of {name}")
                values, update = optimizer_step(stage, engine, step, guard.largest_norm, say)
                done = step + 1
                stop.look_ahead(saver.seconds)
                asked, late = _agree(stop, saved, config.checkpoint.every_minutes, ranks)
                last = done == settings.steps
                due = last or asked or late or done % config.checkpoint.every_steps == 0
                values |= measured(done, wanted=last or (due and not asked and config.checkpoint.keep_best > 0))
                if saver.stall:
                    values["save_stall_seconds"], saver.stall = saver.stall, 0.0
                if log is not None:
                    log.log(done, **values)
                guard.observe(update, name, done, checkpoints)
                if due:
                    ranks.watchdog.beat(f"the checkpoint of step {done} of {name}")
                    state = {"step": done, "norms": list(guard.norms), "skipped": guard.skipped}
                    score = next((values[n] for n in SCORES if math.isfinite(values.get(n, math.nan))), None)
                    saver.save(state | {"next_batch": stage.digest(stage.batch(done))}, values, score)
                    saved = time.monotonic()
                if last or asked:
                    saver.wait()
                    _end(name, done, last, asked, stop, saver, checkpoints)


def optimizer_step(
    stage: Stage[Any], engine: Engine, step: int, largest_norm: float, say: Say
) -> tuple[dict[str, float], Update]:
    """One optimizer step (counted from 0): what to log of it, and what it did."""
    config, ranks, settings = stage.config, stage.ranks, stage.settings
    began = time.perf_counter()
    rate = learning_rate(settings.optimizer, step, settings.steps)
    ranks.traffic.take()
    # what dropout draws depends on nothing that came before
    torch.manual_seed((config.seed * settings.steps + step) * ranks.world_size + ranks.rank)
    try:
        values = stage.accumulate(stage.batch(step), step)
        update = engine.step(rate, largest_norm)
    except RefusedStep as refused:  # on every rank
        engine.discard()
        values, update = {}, Update(math.nan, applied=False)
        say(f"step {step + 1} is skipped. {refused}")
    seconds = time.perf_counter() - began
    throughput = {
        name.replace("num_", "") + "_per_second": values.pop(name) / seconds
        for name in ("num_tokens", "num_pairs")
        if name in values
    }
    values |= {"lr": rate, "grad_norm": update.grad_norm, "seconds": seconds} | throughput
    values |= {} if update.applied else {"skipped": 1}
    return values | by_kind(ranks.traffic.take()) | {"peak_memory_bytes": peak_memory(ranks.device)}, update


def _agree(stop: StopRequest, saved: float, minutes: float | None, ranks: Ranks) -> tuple[bool, bool]:
    """Whether any rank was asked to stop, and whether any finds the last save too old: the same on every rank."""
    late = minutes is not None and time.monotonic() - saved > 60 * minutes
    asked, overdue = largest([bool(stop), late], ranks)
    return bool(asked), bool(overdue)


def _end(
    stage: StageName, done: int, last: bool, asked: bool, stop: StopRequest, saver: Saver, checkpoints: Checkpoints
) -> None:
    """The end of the loop, once the state is saved. Asked to stop at its last step, a run stops before the export.

    Raises:
        CheckpointError: the last step's state could not be saved.
        Interrupted: a rank was asked to stop.
    """
    if last and saver.failure:
        raise CheckpointError(
            f"{stage}: all {done} steps are done, but the last checkpoint cannot be saved: {saver.failure}. Make room "
            "and start again: the run resumes from its last checkpoint."
        )
    if asked:
        by = f" by {stop.name}" if stop else ""
        found = f"but not saved: {saver.failure}" if saver.failure else f"saved in {checkpoints.folder(done)}"
        raise Interrupted(f"{stage}: stopped{by} after step {done}, {found}. Start it again to resume.")


def write_summary(folder: Path, config: RunConfig, ranks: Ranks, seconds: float) -> None:
    """Write what the stage took: its last file, so a stage that has it is finished."""
    peak = largest([peak_memory(ranks.device)], ranks)[0]
    if ranks.is_first:
        content = {
            "world_size": ranks.world_size,
            "zero_stage": config.engine.zero_stage,
            "seconds": round(seconds, 1),
            "peak_memory_bytes": peak,
        }
        write_atomic(folder / SUMMARY, json.dumps(content, indent=2) + "\n")
