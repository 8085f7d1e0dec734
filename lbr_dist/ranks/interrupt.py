"""Being told to stop: by a signal to any rank, or by a time limit ahead, all stop after the same step, and save."""

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
"""The variable with the moment of the job's time limit, in seconds since 1970: set by `lbr submit`'s jobs."""

MARGIN = 1.5
"""The next step and save may take so many times as long as those before."""


def seconds_left() -> float:
    """Until the job's time limit; infinite where none is known, or where it is over: then it was another job's."""
    try:
        left = float(os.environ[END_TIME]) - time.time()
    except (KeyError, ValueError):
        return math.inf
    return left if left > 0 else math.inf


class StopRequest:
    """Whether this rank was told to stop, or should.

    A signal only leaves its name here, however often it comes and whatever is running; the loop looks between two
    steps, and the ranks agree on what they do.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the signal, or what else asks to stop."""
        self._looked = time.monotonic()
        self._steps: deque[float] = deque(maxlen=16)

    def __bool__(self) -> bool:
        return self.name is not None

    def take(self, number: int, frame: FrameType | None) -> None:
        """A handler for `taking_stops`."""
        self.name = self.name or signal.Signals(number).name

    def look_ahead(self, save_seconds: float) -> None:
        """Stop where the time limit would come before another step and a save are done; called after each step.

        The scheduler's signal comes at a moment that was chosen before anything was measured. Here the measurements
        decide, where they ask for more.

        Args:
            save_seconds: what the last save took; 0 before the first one.
        """
        now = time.monotonic()
        self._steps.append(now - self._looked)
        self._looked = now
        left = seconds_left()
        if left < MARGIN * (max(self._steps) + save_seconds):
            self.name = self.name or f"the time limit, {left:.0f} s ahead,"
