"""Requests to stop: after a signal to any rank, or near a time limit, all ranks stop after the same step and save."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""A scheduler's warning ahead of a time limit or a preemption, and Ctrl-C."""


@contextlib.contextmanager
def taking_stops(take: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `take` handle these signals inside the block. Outside the main thread, where none arrive, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, take) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


END_TIME = "LBR_END_TIME"
"""Environment variable: when the job's time limit is reached, in seconds since 1970. Jobs of `lbr submit` set it."""

MARGIN = 1.5
"""The next step and save may take this many times as long as those before."""


def seconds_left() -> float:
    """Seconds until the job's time limit; infinite if none is known, or if it has passed: then it was another job's."""
    try:
        left = float(os.environ[END_TIME]) - time.time()
    except (KeyError, ValueError):
        return math.inf
    return left if left > 0 else math.inf


class StopRequest:
    """Whether this rank was asked to stop, or should stop before a time limit.

    A signal only stores its name here, however often it comes and whatever is running; the loop looks between two
    steps, and the ranks agree on what they do.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal, or what else asks to stop."""
        self._looked = time.monotonic()
        self._steps: deque[float] = deque(maxlen=16)

    def __bool__(self) -> bool:
        return self.name is not None

    def take(self, number: int, frame: FrameType | None) -> None:
        """A handler for `taking_stops`."""
        self.name = self.name or signal.Signals(number).name

    def look_ahead(self, save_seconds: float) -> None:
        """Stop if the time limit would come before another step and a save are done; called after each step.

        The time of the scheduler's signal was chosen before anything was measured. Here the measurements decide, if
        they ask for an earlier stop.

        Args:
            save_seconds: how long the last save took; 0 before the first one.
        """
        now = time.monotonic()
        self._steps.append(now - self._looked)
        self._looked = now
        left = seconds_left()
        if left < MARGIN * (max(self._steps) + save_seconds):
            self.name = self.name or f"the time limit, {left:.0f} s ahead,"
