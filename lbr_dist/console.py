"""How far work without steps has come, told in plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable

_SAY_EVERY = 10.0


class Progress:
    """Says every ten seconds how much of this rank's work is done, and how long the rest will take."""

    def __init__(self, tell: Callable[[str], None], verb: str, things: str, total: int) -> None:
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
