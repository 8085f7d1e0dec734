"""Copies what the first rank prints: to the terminal or file that our own output goes to, and to the rank's log."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, BinaryIO

from lbr_dist.ranks.process import LOG, SCREENS

_LEFT_OPEN = 5.0
"""Seconds to wait for the last output of a rank that has exited: a process that it has left may keep the pipe open."""

_OURS = {"stdout": 1, "stderr": 2}


class FirstOutput:
    """Both output streams of the first rank, through a pipe each, so that compiled libraries' messages are copied too.

    If ours is a terminal, the rank gets it as one more open file, since a live bar needs a real one; there, the rank
    copies its own lines (`ranks.process.copy_output`).

    Args:
        log: the file for the copy; replaced.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        log.write_bytes(b"")
        self._file: BinaryIO = log.open("ab", buffering=0)  # the rank appends to it too
        self._threads: list[threading.Thread] = []
        screens = {name: os.dup(number) for name, number in _OURS.items() if os.isatty(number)}
        self._ends = list(screens.values())
        self.environment: dict[str, str] = {}
        if screens:
            self.environment = {SCREENS: json.dumps(screens), LOG: str(log.absolute())}
        self.pass_fds = tuple(screens.values())
        # one pipe if both go to the same place: two would change the order of the lines
        out = self._pipe(_OURS["stdout"])
        self.streams: dict[str, Any] = {
            "stdout": out,
            "stderr": subprocess.STDOUT if os.path.sameopenfile(*_OURS.values()) else self._pipe(_OURS["stderr"]),
        }

    def _pipe(self, ours: int) -> int:
        read, write = os.pipe()
        self._ends.append(write)
        self._threads.append(threading.Thread(target=self._copy, args=(read, ours), daemon=True))
        return write

    def _copy(self, read: int, ours: int) -> None:
        shown, begun = True, b""
        with open(read, "rb", buffering=0) as pipe:
            while chunk := pipe.read(65536):
                # whole lines, since the other stream goes to the same log
                lines, end, begun = (begun + chunk).rpartition(b"\n")
                self._note(lines + end)
                try:
                    while shown and chunk:
                        chunk = chunk[os.write(ours, chunk) :]
                except OSError:  # nobody reads our output any more
                    shown = False
        self._note(begun)

    def _note(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the log
            self._file.write(text)

    def start(self) -> None:
        """Copy from now on: the rank has been started, and has its ends of the pipes, so ours are closed."""
        while self._ends:
            os.close(self._ends.pop())
        # not earlier: a process is started safely only while no other thread runs
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def close(self) -> None:
        """Wait for the last lines of a rank that has exited."""
        self.start()
        for thread in self._threads:
            thread.join(_LEFT_OPEN)
        self._file.close()
