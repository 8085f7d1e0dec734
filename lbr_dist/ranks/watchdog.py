"""A hung rank ends, by itself and within a stated time, and every rank's stacks are in the log.

Each rank watches itself: whoever hangs, the others wait for it in their next collective, so all of them stop making
progress together. Stacks go to a file, since a terminal would drown in them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lbr_dist.errors import EXIT_HUNG

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a rank write the stacks of its threads to its file, and go on."""

_LOCKED_UP = 3.0
"""Seconds beyond the deadline, after which a rank ends even where a library holds the interpreter."""


class Watchdog:
    """Ends this process where too much time passes between two calls of `beat`. Does nothing until `watching`."""

    def __init__(self) -> None:
        self._deadline = 0.0
        self._last, self._doing, self._name = 0.0, "", ""
        self._stop = threading.Event()
        self._stacks: TextIO | None = None

    @contextlib.contextmanager
    def watching(self, seconds: float, name: str, doing: str, stacks: Path) -> Iterator[None]:
        """Watch this process inside the block.

        Args:
            seconds: the deadline between two beats.
            name: of this process, for the log.
            doing: what it does first.
            stacks: the file for the stacks; it is gone again where none were written.
        """
        stacks.parent.mkdir(parents=True, exist_ok=True)
        with stacks.open("w", encoding="utf-8") as file:
            self._deadline, self._name, self._stacks = seconds, name, file
            # written by C code, which needs no interpreter: a rank that hangs inside a library can still be asked
            faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
            self._stop = threading.Event()
            thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self.beat(doing)
            thread.start()
            try:
                yield
            finally:
                self._stop.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                faulthandler.unregister(STACKS_SIGNAL)
                self._deadline, self._stacks = 0.0, None
        if not stacks.stat().st_size:
            stacks.unlink()

    def beat(self, doing: str) -> None:
        """Progress: this process now begins with `doing`."""
        self._last, self._doing = time.monotonic(), doing
        if self._stacks is not None:
            faulthandler.dump_traceback_later(self._deadline + _LOCKED_UP, exit=True, file=self._stacks)

    def _watch(self) -> None:
        while not self._stop.wait(max(0.05, self._last + self._deadline - time.monotonic())):
            waited = time.monotonic() - self._last
            if waited >= self._deadline:
                self._end(waited)

    def _end(self, waited: float) -> None:
        assert self._stacks is not None
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        print(
            f"error: {self._name}: no progress for {waited:.0f} s in {self._doing} (cluster.timeout_minutes "
            f"{self._deadline / 60:g}). This rank, or one that it waits for, hangs; its stacks are in "
            f"{self._stacks.name}, and it ends.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HUNG)
