"""What both stages share: the engine around their model, and the loop of steps, log, checkpoints and summary."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.checkpoint.resume import on_first, resume
from lbr_dist.checkpoint.saver import Saver, base_identity
from lbr_dist.config import OptimizerConfig, RunConfig, Stage
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine, Update, sharded_init
from lbr_dist.errors import CheckpointError, Interrupted, RefusedStep, TrainingError
from lbr_dist.export.checksums import SUMMARY
from lbr_dist.metrics import MetricsLog
from lbr_dist.model.bottleneck import LBRModel, load_model
from lbr_dist.ranks.group import Ranks, largest, total
from lbr_dist.ranks.interrupt import StopRequest, taking_stops
from lbr_dist.ranks.traffic import Count
from lbr_dist.storage.files import write_atomic

SCORES = ("heldout_target_loss", "heldout_loss", "heldout_perplexity")
"""The measurement that tells which checkpoint is better: the first of these that there is; lower is better."""


def load_engine(
    config: RunConfig, folder: Path, tokenizer: TextTokenizer, stage: Stage, ranks: Ranks
) -> tuple[Engine, LBRModel]:
    """The model of `folder`, sharded as it is built, under the engine; the bottleneck at its own learning rate."""
    learns = stage == "learn"
    sharding = sharded_init(config.engine, config.model.dtype)
    variational = learns and config.learn.kl_weight > 0
    temperature = config.represent.temperature if config.represent.learn_temperature and not learns else None
    model = load_model(config.model, folder, tokenizer, config.seed, sharding, variational, temperature)
    optimizer = config.learn.optimizer if learns else config.represent.optimizer
    # every micro-batch of stage 1 ends in the head: it is gathered once a step
    resident = [model.language_loss.weight] if learns and config.engine.resident_head else []
    dtype, fast = config.model.dtype, model.fast_parameters
    return Engine(model, config.engine, optimizer, dtype, fast, resident, ranks.traffic), model


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


class SpikeGuard:
    """Decides which gradients are too large to be applied, from the norms of the last ones.

    Every rank sees the same norms, so every rank decides the same.
    """

    HISTORY, ENOUGH = 64, 16

    def __init__(self, optimizer: OptimizerConfig, norms: Sequence[float] = (), skipped: int = 0) -> None:
        self.optimizer = optimizer
        self.norms = deque(norms, maxlen=self.HISTORY)
        self.skipped = skipped
        """Steps in a row."""

    @property
    def largest_norm(self) -> float:
        """The largest norm to be applied; infinite while too few are known to tell."""
        if not self.optimizer.spike_factor or len(self.norms) < self.ENOUGH:
            return math.inf
        return self.optimizer.spike_factor * statistics.median(self.norms)

    def observe(self, update: Update, stage: Stage, step: int, checkpoints: Checkpoints) -> None:
        """Take note of a step.

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


def train(
    stage: Stage,
    config: RunConfig,
    ranks: Ranks,
    engine: Engine,
    run_step: Callable[[int], dict[str, float]],
    batch_digest: Callable[[int], str],
    diagnose: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Run a stage's steps, from its newest checkpoint on.

    Args:
        stage: `learn` or `represent`.
        config: the run.
        ranks: this process among its peers.
        engine: the model and its optimizer.
        run_step: accumulates the gradients of the step of this number (from 0) and returns what to log; the
            same on every rank.
        batch_digest: tells the global batch of a step from any other one: a run goes on with the very next batch.
        diagnose: measures the model on held-out data, every `diagnose_every` steps.

    Raises:
        TrainingError: too many steps in a row were skipped.
        CheckpointError: the run cannot go on from its checkpoints, or the last one cannot be saved.
        Interrupted: a rank was told to stop; the state is saved.
    """
    settings = config.learn if stage == "learn" else config.represent
    folder = config.stage_path(stage)
    checkpoints = Checkpoints(folder / "checkpoints")
    # all weights replace the base's; adapters are nothing without theirs
    base = on_first(lambda: base_identity(config.stage_base(stage), weights=config.model.lora.rank > 0), ranks)
    state = resume(engine, checkpoints, ranks, config, base) or {"step": 0, "norms": [], "skipped": 0}
    first: int = state["step"]
    if first and state["next_batch"] != batch_digest(first):
        raise CheckpointError(
            f"{checkpoints.folder(first)}: the batch of step {first + 1} is not the one it was when this was saved: "
            "the data has changed. Put back the files that the run began with, or begin another run_dir."
        )
    guard = SpikeGuard(settings.optimizer, state["norms"], state["skipped"])
    engine.train()

    def diagnosed(done: int, wanted: bool) -> dict[str, float]:
        if diagnose is None or not (wanted or done % max(1, settings.diagnose_every) == 0):
            return {}
        ranks.watchdog.beat(f"the measurements of step {done} of {stage}")
        engine.train(False)
        values = diagnose()
        engine.train()
        return values

    log_or_not = MetricsLog(folder, stage, settings.steps, start_step=first) if ranks.is_first else nullcontext()
    stop = StopRequest()
    with log_or_not as log, taking_stops(stop.take):
        say = log.say if log is not None else lambda message: None
        if first == 0 and settings.steps:
            values = diagnosed(0, wanted=True)
            if log is not None and values:
                log.log(0, **values)
        with Saver(engine, checkpoints, ranks, config, stage, base, say) as saver:
            saved = time.monotonic()
            for step in range(first, settings.steps):
                ranks.watchdog.beat(f"step {step + 1} of {stage}")
                values, update = _take(step, config, stage, ranks, engine, run_step, guard, say)
                done = step + 1
                stop.look_ahead(saver.seconds)
                told, late = _agree(stop, saved, config.checkpoint.every_minutes, ranks)
                last = done == settings.steps
                due = last or told or late or done % config.checkpoint.every_steps == 0
                values |= diagnosed(done, wanted=last or (due and not told and config.checkpoint.keep_best > 0))
                if saver.stall:
                    values["save_stall_seconds"], saver.stall = saver.stall, 0.0
                if log is not None:
                    log.log(done, **values)
                guard.observe(update, stage, done, checkpoints)
                if due:
                    ranks.watchdog.beat(f"the checkpoint of step {done} of {stage}")
                    state = {"step": done, "norms": list(guard.norms), "skipped": guard.skipped}
                    score = next((values[n] for n in SCORES if math.isfinite(values.get(n, math.nan))), None)
                    saver.save(state | {"next_batch": batch_digest(done)}, values, score)
                    saved = time.monotonic()
                if last or told:
                    saver.wait()
                    _end(stage, done, last, told, stop, saver, checkpoints)


def _take(
    step: int,
    config: RunConfig,
    stage: Stage,
    ranks: Ranks,
    engine: Engine,
    run_step: Callable[[int], dict[str, float]],
    guard: SpikeGuard,
    say: Callable[[str], None],
) -> tuple[dict[str, float], Update]:
    """One optimizer step: what to log of it, and what it did."""
    settings = config.learn if stage == "learn" else config.represent
    began = time.perf_counter()
    rate = learning_rate(settings.optimizer, step, settings.steps)
    ranks.traffic.take()
    # what dropout draws depends on nothing that came before
    torch.manual_seed((config.seed * settings.steps + step) * ranks.world_size + ranks.rank)
    try:
        values = run_step(step)
        update = engine.step(rate, guard.largest_norm)
    except RefusedStep as refused:  # on every rank alike
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
    return values | exchanged(ranks) | {"peak_memory_bytes": peak_memory(ranks.device)}, update


def _agree(stop: StopRequest, saved: float, minutes: float | None, ranks: Ranks) -> tuple[bool, bool]:
    """Whether a rank was told to stop, and whether the last save is too long ago for one: the same on every rank."""
    late = minutes is not None and time.monotonic() - saved > 60 * minutes
    told, overdue = largest([bool(stop), late], ranks)
    return bool(told), bool(overdue)


def _end(
    stage: Stage, done: int, last: bool, told: bool, stop: StopRequest, saver: Saver, checkpoints: Checkpoints
) -> None:
    """The end of the loop, when the state is saved. Told to stop at the last step, a run stops before its export.

    Raises:
        CheckpointError: it is not, though this was the last step.
        Interrupted: a rank was told to stop.
    """
    if last and saver.failure:
        raise CheckpointError(
            f"{stage}: all {done} steps are done, but the last checkpoint cannot be saved: {saver.failure}. Make room "
            "and start again: the run goes on from its last checkpoint."
        )
    if told:
        by = f" by {stop.name}" if stop else ""
        found = f"but not saved: {saver.failure}" if saver.failure else f"saved in {checkpoints.folder(done)}"
        raise Interrupted(f"{stage}: stopped{by} after step {done}, {found}. Started again, the run goes on.")


def exchanged(ranks: Ranks) -> dict[str, float]:
    """Calls and bytes of this rank's collectives since they were last taken, by kind and in all."""
    kinds: dict[str, Count] = {}
    for name, count in ranks.traffic.take().items():
        kind = name.replace("_into_tensor", "").replace("_tensor", "").replace("_coalesced", "")
        kinds[kind] = kinds.get(kind, Count()) + count
    values: dict[str, float] = {}
    for kind, count in kinds.items():
        values |= {f"{kind}_calls": count.calls, f"{kind}_bytes": count.within + count.between}
    values["bytes_within_node"] = sum(count.within for count in kinds.values())
    values["bytes_between_nodes"] = sum(count.between for count in kinds.values())
    return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or that this process held of the machine's memory, so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # not ru_maxrss, which a child takes over from its parent
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def write_summary(folder: Path, config: RunConfig, ranks: Ranks, seconds: float) -> None:
    """Say that the stage is finished, and what it took: the last thing a stage does."""
    peak = total([peak_memory(ranks.device)], ranks)[0]
    if ranks.is_first:
        content = {
            "world_size": ranks.world_size,
            "zero_stage": config.engine.zero_stage,
            "seconds": round(seconds, 1),
            "peak_memory_bytes": int(peak),
        }
        write_atomic(folder / SUMMARY, json.dumps(content, indent=2) + "\n")
