"""Being told to stop: a signal to any rank stops all of them after the same step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
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


class StopRequest:
    """Whether this rank was told to stop.

    A signal only leaves its name here, however often it comes and whatever is running; the loop looks between two
    steps, and the ranks agree on what they do.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def take(self, number: int, frame: FrameType | None) -> None:
        """A handler for `taking_stops`."""
        self.name = self.name or signal.Signals(number).name
