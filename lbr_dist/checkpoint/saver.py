"""Save a stage's checkpoints while it trains: sharded, with checksums, published as a whole or not at all.

    copy       every rank copies its share to host memory                               training waits only for this
    write      every rank writes its file and flushes it to the disk                    in the background
    agree      all ranks report size and checksum, or what went wrong
    publish    rank 0 writes the manifest, renames the folder, moves the pointer

If a process dies at any point, the last checkpoint stays as it was. A save that fails is logged as a warning; training
continues, and the next save tries again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import lbr_dist
from lbr_dist import __version__
from lbr_dist.checkpoint import manifest, shards
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest
from lbr_dist.config import RunConfig, to_dict
from lbr_dist.console import Say, size_text
from lbr_dist.engine import Engine
from lbr_dist.ranks.group import Ranks, from_all
from lbr_dist.storage.files import checksum, sync, text_checksum

_SPARE = 1.02  # for the manifest and the file system's overhead
_PATIENCE = timedelta(days=1)  # how long the background thread waits for the slowest disk; the watchdog catches hangs


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a rank reports to the others about its part of a save."""

    problem: str = ""
    num_bytes: int = 0
    free_bytes: int = 0
    written: shards.Written | None = None


def base_identity(folder: Path, weights: bool) -> dict[str, str]:
    """Checksums that identify a model folder.

    Args:
        folder: in Hugging Face's format.
        weights: include the weights; this reads all of them.
    """
    files = [folder / name for name in ("config.json", "tokenizer.json") if (folder / name).exists()]
    files += sorted(folder.glob("*.safetensors")) if weights else []
    return {file.name: checksum(file) for file in files}


def versions() -> dict[str, str]:
    """Versions of lbr-dist, torch and deepspeed, and a checksum of lbr-dist's source files."""
    root = Path(lbr_dist.__file__).parent
    sources = sorted(
        Path(top) / n for top, _, names in os.walk(root, followlinks=True) for n in names if n[-3:] == ".py"
    )
    code = text_checksum("".join(f"{path.relative_to(root)} {checksum(path)}\n" for path in sources))
    return {"lbr-dist": __version__, "code": code} | {name: version(name) for name in ("torch", "deepspeed")}


class Saver:
    """Saves a stage's checkpoints. Every rank creates one. Use it as a context manager.

    Args:
        engine: holds the state to save.
        checkpoints: the folder to save to.
        ranks: this process's rank and the world size.
        config: of the run.
        stage: `learn` or `represent`.
        base: `base_identity` of the folder that the stage's model came from.
        say: prints a line on the first rank.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        ranks: Ranks,
        config: RunConfig,
        stage: str,
        base: dict[str, str],
        say: Say,
    ) -> None:
        self.engine, self.checkpoints, self.ranks, self.say = engine, checkpoints, ranks, say
        self.settings = config.checkpoint
        self._blank = Manifest(
            stage=stage,
            step=0,
            world_size=ranks.world_size,
            saved_at="",
            versions=versions(),
            config=to_dict(config),
            base=base,
            parameters=engine.shapes(),
            state={},
            values={},
            score=None,
            files={},
        )
        # a separate group, so that the ranks can agree in the background while training uses the others
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._buffer: Tensor | None = None
        self.stall = 0.0
        """Seconds that training waited for the last save."""
        self.seconds = 0.0
        """Seconds from the start of the last save until it was published."""
        self.failure: str | None = None
        """Why the last save failed; None if it did not."""
        if not engine.can_save:
            say("note: no checkpoints will be saved, because the optimizer is offloaded to nvme")
        elif self.settings.background:
            self._copy(self._tensors())  # touching the buffer for the first time takes longer than any copy

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for a save that is still being written."""
        self._thread.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def save(self, state: dict[str, Any], values: dict[str, Any], score: float | None) -> None:
        """Save after ``state["step"]`` steps, in the background if `checkpoint.background` is set.

        Args:
            state: what the training loop needs to resume; the same on every rank.
            values: what was logged at this step.
            score: the held-out loss at this step, if it was measured.
        """
        if not self.engine.can_save:
            return
        began = time.perf_counter()
        self.wait()
        tensors, (notes, numbers) = self._tensors(), _random_state(self.ranks)
        problem = self._prepare(state["step"], shards.file_bytes(tensors | numbers, notes))
        if problem:
            self._fail(state["step"], problem)
            return
        if self.settings.background:
            tensors = self._copy(tensors)
        state = state | {"optimizer_steps": self.engine.optimizer_steps}
        blank = replace(self._blank, step=state["step"], state=state, values=values, score=score)
        self._running = self._thread.submit(self._write, blank, tensors | numbers, notes, began)
        if not self.settings.background:
            self.wait()
        self.stall = time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the last save is published or has failed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    # ---- the parts of a save ---------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of this rank's file, as views of the optimizer's state."""
        return {
            f"{kind}/{part.name}": view
            for part in self.engine.slices()
            if part.stop > part.start
            for kind, view in part.tensors.items()
        }

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors into one buffer in host memory."""
        if self._buffer is None:
            elements = sum(tensor.numel() for tensor in tensors.values())
            self._buffer = torch.empty(elements, dtype=torch.float32, pin_memory=self.ranks.device.type == "cuda")
        copies: dict[str, Tensor] = {}
        offset = 0
        for names in _runs(tensors):
            first, length = tensors[names[0]], sum(len(tensors[name]) for name in names)
            source = first.as_strided((length,), (1,), first.storage_offset())
            copy = self._buffer[offset : offset + length]
            if source.device.type == "cpu":
                # for long copies the C library bypasses the CPU's caches: half the time of torch's copy
                np.copyto(copy.numpy(), source.numpy())
            else:
                copy.copy_(source, non_blocking=True)
            copies |= dict(zip(names, copy.split([len(tensors[name]) for name in names]), strict=True))
            offset += length
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return {name: copies[name] for name in tensors}

    def _prepare(self, step: int, num_bytes: int) -> str:
        """Make the folder and check for free space. Returns the problem, if any; the same on every rank."""
        problem, free = "", 0
        if self.ranks.is_first:
            try:
                self.checkpoints.begin(step)
                free = manifest.free_bytes(self.checkpoints.path)
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}"
        reports = self._gather(SaveReport(problem, num_bytes, free))
        needed, free = int(sum(report.num_bytes for report in reports) * _SPARE), reports[0].free_bytes
        if not reports[0].problem and needed > free:
            return f"{self.checkpoints.path}: needs {size_text(needed)}, {size_text(free)} are free"
        return reports[0].problem

    def _write(self, blank: Manifest, tensors: dict[str, Tensor], notes: dict[str, str], began: float) -> None:
        """Write this rank's file, agree with the others, publish, and delete checkpoints that no rule keeps."""
        folder = self.checkpoints.saving(blank.step)
        path = folder / shards.file_name(self.ranks.rank)
        try:
            report = SaveReport(written=shards.write(path, tensors, notes))
            sync(folder)
        except OSError as error:
            report = SaveReport(f"rank {self.ranks.rank}: {error.filename or path}: {error.strerror}")
        try:
            reports = self._gather(report)
            problem = "; ".join(report.problem for report in reports if report.problem)
            if not problem and self.ranks.is_first:
                problem = self._publish(blank, [report.written for report in reports if report.written])
            problem = self._gather(SaveReport(problem))[0].problem or problem
        except RuntimeError:  # another rank has exited, so the run ends too
            self.failure = "another rank is gone"
            return
        if problem:
            self._fail(blank.step, problem)
            return
        self.failure, self.seconds = None, time.perf_counter() - began
        if self.ranks.is_first:
            self._retain()

    def _publish(self, blank: Manifest, written: list[shards.Written]) -> str:
        files = {one.name: {"bytes": one.num_bytes, "xxh3_128": one.xxh3_128} for one in written}
        try:
            self.checkpoints.publish(replace(blank, saved_at=manifest.now(), files=files))
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return ""

    def _retain(self) -> None:
        try:
            self.checkpoints.retain(self.settings)
        except OSError as error:  # not fatal: the new checkpoint is good
            self.say(f"note: an old checkpoint could not be deleted: {error.filename}: {error.strerror}")

    def _fail(self, step: int, problem: str) -> None:
        self.failure = problem
        if self.ranks.is_first:
            # frees the space that it takes on a full disk
            shutil.rmtree(self.checkpoints.saving(step), ignore_errors=True)
            steps = [found.step for found in self.checkpoints.complete()]
            last = f"the last one is {self.checkpoints.folder(steps[-1])}" if steps else "there is none yet"
            self.say(
                f"warning: no checkpoint of step {step}: {problem}. Training continues, and the next save tries "
                f"again; {last}."
            )

    def _gather(self, report: SaveReport) -> list[SaveReport]:
        return from_all(report, self.ranks, self._group)


def _runs(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Group the names of flat tensors that are adjacent in one storage."""
    run: list[str] = []
    end = None
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        tensor = tensors[name]
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        if run and place != end:
            yield run
            run = []
        run.append(name)
        end = place[0], place[1] + len(tensor)
    if run:
        yield run


def _random_state(ranks: Ranks) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The states of this rank's random generators, as notes and tensors for its file."""
    tensors = {"random/torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {"random": json.dumps(random.getstate())}, tensors


def restore_random_state(notes: dict[str, str], tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Restore the states of this rank's random generators."""
    version_, numbers, gauss = json.loads(notes["random"])
    random.setstate((version_, tuple(numbers), gauss))
    torch.set_rng_state(tensors["random/torch"])
    if "random/cuda" in tensors and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], ranks.device)
