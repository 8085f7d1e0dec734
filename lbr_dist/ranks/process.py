"""What a training process does once: its large imports, its output, and its exit."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO


@contextmanager
def large_imports() -> Iterator[None]:
    """For imports of torch, transformers and DeepSpeed: pauses the garbage collector, then exempts all objects from it.

    These imports create 600,000 objects that all stay alive; scanning them again and again takes a quarter of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def quiet_libraries() -> None:
    """Hide what libraries print about themselves; their warnings about the run stay."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


SCREENS, LOG = "LBR_SCREENS", "LBR_LOG"
"""Environment variables of the first rank on a terminal: open files of the terminal, by the stream (`stdout`, `stderr`)
that each stands for, as JSON; and the log."""


class Copied(io.TextIOBase):
    """A stream of text to a terminal that also goes to a log. What the live bar draws goes to `screen` alone.

    Args:
        screen: the terminal.
        log: a text file open for appending, flushed after each line.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self.screen, self.log = screen, log

    def write(self, text: str) -> int:
        self.note(text)
        return self.screen.write(text)

    def note(self, text: str) -> None:
        """Write to the log alone; a full disk costs the log, not the training."""
        with contextlib.suppress(OSError):
            self.log.write(text)

    def flush(self) -> None:
        self.screen.flush()

    def isatty(self) -> bool:
        return self.screen.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.screen.fileno()


def copy_output() -> None:
    """Print to the terminal that the launcher hands over, and to the log, if this is the first rank on a terminal.

    The launcher itself copies all else: what compiled libraries print, and what is not printed to a terminal.
    """
    if SCREENS not in os.environ:
        return
    log = open(os.environ.pop(LOG), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (open until the exit)
    for name, number in json.loads(os.environ.pop(SCREENS)).items():
        setattr(sys, name, Copied(open(number, "w", buffering=1, encoding="utf-8"), log))  # noqa: SIM115


def leave(code: int) -> NoReturn:
    """Exit after the `atexit` handlers, without tearing down 3,000 modules, which takes a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
