"""What people read on the console: lines, progress, sizes and durations in words. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Say = Callable[[str], None]
"""Prints a line."""

_SAY_EVERY = 10.0


def say(message: str) -> None:
    """Print a line to standard output, at once."""
    print(message, flush=True)


def say_aside(message: str) -> None:
    """Print a line to standard error, at once: notes and warnings beside a command's output."""
    print(message, file=sys.stderr, flush=True)


def silent(message: str) -> None:
    """Print nothing: for the ranks whose first one speaks for all."""


def size_text(nbytes: float) -> str:
    """Bytes in the largest unit of which there is one: ``1.5 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def gib(nbytes: float) -> str:
    """Bytes in GiB, so that two figures compare: ``0.5 GiB``."""
    return f"{nbytes / 2**30:.1f} GiB"


def clock(seconds: float) -> str:
    """A duration: ``4:05``, or ``1:04:05`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Progress:
    """Says every ten seconds how much of this rank's work is done, and how long the rest will take."""

    def __init__(self, tell: Say, verb: str, things: str, total: int) -> None:
        self.tell, self.verb, self.things, self.total, self.done = tell, verb, things, total, 0
        self.began = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        self._say(self.done)

    def within(self, size: int, done: int, total: int) -> None:
        """Inside a unit of `size`, of which `done` of `total` are there."""
        self._say(self.done + size * done // total)

    def _say(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said >= _SAY_EVERY and 0 < done < self.total:
            self.said = now
            left = (now - self.began) * (self.total - done) / done
            self.tell(f"{self.verb} {done:,} of {self.total:,} {self.things} of the first rank, left {left:.0f} s")
