"""What a stage reports while it trains: a JSON line per step, TensorBoard scalars, and progress on the screen."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from lbr_dist.console import clock, size_text
from lbr_dist.ranks.process import Copied
from lbr_dist.storage.files import write_atomic

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)

PLAIN_EVERY_SECONDS = 5.0

_SHOWN = (  # key, name on the screen, format
    ("loss", "loss", ".3f"),
    ("target_loss", "target", ".2f"),
    ("text_loss", "text", ".2f"),
    ("kl", "kl", ".3f"),
    ("accuracy", "accuracy", ".2f"),
    ("masked_negatives", "masked", ".2%"),
    ("alignment", "align", ".2f"),
    ("uniformity", "uniform", ".2f"),
    ("grad_norm", "norm", ".2g"),
    ("lr", "lr", ".1e"),
)
_TELLING = ("skipped", "loss", "tokens_per_second", "pairs_per_second", "accuracy")
_HELDOUT = "heldout_target_loss"
_HELDOUT_AGAINST = ("shuffled", "without")  # endings of the losses that it is compared with
_DEV_BESIDE = ("accuracy", "mrr")  # endings of stage 2's other metrics on the dev pairs
_SIZES = (("peak_memory_bytes", "memory"), ("bytes_within_node", "from ranks"), ("bytes_between_nodes", "from nodes"))
_RATES = (("tokens_per_second", "tok/s"), ("pairs_per_second", "pairs/s"))


class MetricsLog:
    """The one place that a stage's rank 0 reports its steps to; use it as a context manager.

    Writes `metrics.jsonl` (one object per step, flushed each time, NaN and infinity as null) and, if TensorBoard is
    installed, `tensorboard/`. On a terminal it shows a live bar, elsewhere a plain line every few seconds. Held-out
    diagnostics and skipped steps are shown at once on a line of their own, on both.

    Args:
        stage_dir: folder of the stage, created if missing.
        stage: `learn` or `represent`.
        total_steps: the last step of the stage.
        start_step: the last step already done; 0 for a new stage. Later lines of metrics.jsonl, written after the
            checkpoint that the run resumes from, are dropped, so that the file has each step once.
        quiet: show nothing; the files are still written.
        stream: where progress goes; standard output by default.
    """

    def __init__(
        self,
        stage_dir: Path,
        stage: str,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.stage, self.total_steps, self.quiet = stage, total_steps, quiet
        self.stream = sys.stdout if stream is None else stream
        stage_dir.mkdir(parents=True, exist_ok=True)
        path = stage_dir / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._failed = False
        self._writer = _tensorboard_writer(stage_dir / "tensorboard", start_step)
        # the speed of the last steps, not of all: the first ones compile and warm up
        self._times = deque([(start_step, time.monotonic())], maxlen=50)
        self._last_plain = -math.inf
        live = not quiet and self.stream.isatty()
        screen = self.stream.screen if isinstance(self.stream, Copied) else self.stream
        self._progress = _live_bar(screen) if live else None
        if self._progress is not None:
            self._task = self._progress.add_task(stage, total=total_steps, completed=start_step, left="", values=[])

    def __enter__(self) -> MetricsLog:
        if self._progress is not None:
            self._progress.start()
            if isinstance(self.stream, Copied):  # what rich shows above the bar goes to the log too; it restores both
                sys.stdout, sys.stderr = Copied(sys.stdout, self.stream.log), Copied(sys.stderr, self.stream.log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live bar and close the files; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
        with contextlib.suppress(OSError):  # from data that cannot be flushed; `log` has already warned
            if self._writer is not None:
                self._writer.close()
            self._file.close()

    def log(self, step: int, **values: Any) -> None:
        """Report one step, counted from 1, or, as step 0, what was measured before the first one.

        A step may be reported again with only diagnostics. Values are numbers, strings or scalar tensors; a true
        `skipped` means that the step did not change the model.
        """
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        numbers = {key: value for key, value in plain.items() if isinstance(value, int | float)}
        bad = {key: None for key, value in numbers.items() if not math.isfinite(value)}
        try:
            self._file.write(json.dumps({"step": step, **plain, **bad}) + "\n")
            self._file.flush()
            if self._writer is not None:
                for key, value in numbers.items():
                    self._writer.add_scalar(f"{self.stage}/{key}", value, step)
        except OSError as error:  # a full disk costs the log, not the training
            if not self._failed:
                self.say(f"warning: {self._file.name}: {error.strerror}. Training continues; the file may lack steps.")
            self._failed = True
        now = time.monotonic()
        trained = step > self._times[-1][0]
        if trained:
            self._times.append((step, now))
        elif len(self._times) == 1:
            # measuring before the first step is not part of a step's time
            self._times[0] = (step, now)
        left = self._time_left()
        diagnosed = _diagnosed(numbers)
        told = bool(diagnosed or numbers.get("skipped"))
        due = step >= self.total_steps or now - self._last_plain >= PLAIN_EVERY_SECONDS
        if told or due:
            width = len(str(self.total_steps))
            head = f"{self.stage:<9} {step:>{width}}/{self.total_steps}"
            line = "  ".join([head, *_shown(numbers), *diagnosed, *([f"left {left}"] if trained else [])])
            if told or self._progress is None:
                self.say(line)
            else:
                self._note(line)
            if trained:
                self._last_plain = now
        if self._progress is not None:
            self._progress.update(self._task, completed=step, left=left, values=_shown(numbers, telling=True))

    def say(self, message: str) -> None:
        """Print a line, above the live bar if there is one."""
        if self.quiet:
            return
        if self._progress is not None:
            self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)
            self._note(message)
        else:
            print(message, file=self.stream, flush=True)

    def _note(self, message: str) -> None:
        """Write a line to the rank's log alone: the screen has it, or has the live bar instead."""
        if isinstance(self.stream, Copied):
            self.stream.note(message + "\n")

    def _time_left(self) -> str:
        (first_step, first_time), (step, now) = self._times[0], self._times[-1]
        if step <= first_step:
            return "?"
        return clock((now - first_time) / (step - first_step) * max(0, self.total_steps - step))


def _drop_lines_after(path: Path, start_step: int) -> None:
    """Keep one line for each of the steps 0 to start_step, or none if the stage starts over.

    A half-written line of a killed run is dropped too.
    """
    if not path.exists():
        return
    kept: dict[int, dict[str, Any]] = {}
    # a stage that starts over measures step 0 again
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if start_step > 0 else []
    for line in lines:
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(step, int) and 0 <= step <= start_step:
            # diagnostics may be on a line of their own
            kept[step] = {**kept.get(step, {}), **entry}
    write_atomic(path, "".join(json.dumps(kept[step]) + "\n" for step in sorted(kept)))


@functools.cache
def _tell_once(message: str) -> None:
    logger.info(message)


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    """A SummaryWriter, or None if TensorBoard is not installed."""
    try:
        # here and not above: the import takes seconds, and TensorBoard is optional
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _tell_once("tensorboard is not installed: scalars go to metrics.jsonl only")
        return None
    # purge_step hides the events of steps that are run again
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)


def _live_bar(stream: TextIO, width: int | None = None) -> Progress:
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    class Bar(Progress):  # here, since rich is not imported with this module
        def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
            """One line for each task that fits into the terminal as it is now."""
            table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
            for task in tasks:
                of = (task.description, task.completed, task.total, task.fields["left"], task.fields["values"])
                head, bar, values = bar_parts(self.console.width, *of)
                cells: list[Any] = [Text(head, style="bold", no_wrap=True)]
                cells += [ProgressBar(task.total, task.completed, bar)] if bar else []
                table.add_row(*cells, Text(values, style="dim", no_wrap=True))
            return table

    return Bar(console=Console(file=stream, width=width))


_GAP = 2


def bar_parts(
    width: int, stage: str, step: float, total: float | None, left: str, values: Sequence[str]
) -> tuple[str, int, str]:
    """What the live bar shows in a terminal of this many columns.

    Stage and step are never cut; the time left comes next, then a short bar, then the values as far as they fit.

    Returns:
        Stage, step and time left; the columns of the bar, 0 for none; the values.
    """
    head = f"{stage:<9} {step:>{len(f'{total:.0f}')}.0f}/{total:.0f}"
    clock_width = max(len(left), len("0:00:00"))  # so that the bar stays where it is while the time gets shorter
    free = width - len(head) - len("left ") - clock_width - 2 * _GAP
    if free < 0:
        return head, 0, ""
    head += f"{'':<{_GAP}}left {left:<{clock_width}}"
    bar = max(6, width // 8)
    if free < bar + _GAP:
        return head, 0, ""
    room, shown = free - bar - _GAP, ""
    for value in values:
        longer = f"{shown}{'':<{_GAP if shown else 0}}{value}"
        if len(longer) > room:
            break
        shown = longer
    return head, bar, shown


def _shown(numbers: dict[str, int | float], telling: bool = False) -> list[str]:
    """A step's values as text; on request, the most telling ones first."""
    parts = {"skipped": "skipped"} if numbers.get("skipped") else {}
    parts |= {key: f"{name} {numbers[key]:{form}}" for key, name, form in _SHOWN if key in numbers}
    parts |= {key: f"{_rate(numbers[key])} {unit}" for key, unit in _RATES if key in numbers}
    parts |= {key: f"{name} {size_text(numbers[key])}" for key, name in _SIZES if numbers.get(key)}
    first = [key for key in _TELLING if telling and key in parts]
    return [parts[key] for key in dict.fromkeys([*first, *parts])]


def _diagnosed(numbers: dict[str, int | float]) -> list[str]:
    parts = []
    if _HELDOUT in numbers:
        others = {name: numbers.get(f"{_HELDOUT}_{name}") for name in _HELDOUT_AGAINST}
        against = ", ".join(f"{name} {value:.2f}" for name, value in others.items() if value is not None)
        parts.append(f"held-out {numbers[_HELDOUT]:.2f}" + (f" ({against})" if against else ""))
    if "heldout_loss" in numbers:
        others = {name: numbers.get(f"heldout_{name}") for name in _DEV_BESIDE}
        beside = ", ".join(f"{name} {value:.2f}" for name, value in others.items() if value is not None)
        parts.append(f"held-out {numbers['heldout_loss']:.3f}" + (f" ({beside})" if beside else ""))
    if "heldout_perplexity" in numbers:
        perplexity = numbers["heldout_perplexity"]
        parts.append(f"ppl {perplexity:,.1f}" if perplexity < 1e7 else f"ppl {perplexity:.1e}")
    if "effective_rank" in numbers:
        parts.append(f"rank {_rate(numbers['effective_rank'])}")
    return parts


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or not math.isfinite(value) else f"{value:.1f}"
