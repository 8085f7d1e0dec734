"""The doctor's findings, and how it asks programs and file systems that may hang. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "fault"]

SECONDS = 5.0
"""Time for a program to answer."""

HANGS_SECONDS = 10.0
"""Time for what is instant on an idle node but slow on a busy one: drivers, network file systems, name servers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do about a warning or a fault."""


def ok(name: str, found: str) -> Finding:
    """A check that found no problem."""
    return Finding(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Finding:
    """A problem that a run may still work with."""
    return Finding(name, "warning", found, advice)


def fault(name: str, found: str, advice: str) -> Finding:
    """A problem that will make a run fail."""
    return Finding(name, "fault", found, advice)


def count(findings: Iterable[Finding], state: State) -> int:
    """How many findings have a state."""
    return sum(finding.state == state for finding in findings)


# ---- asking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program printed, and why it failed, if it did."""

    text: str
    """Its standard output, or as much as came in time."""

    failure: str | None = None
    """Why the answer is not complete; None if the program exited with code 0."""

    missing: bool = False
    """There is no such program."""


def ask(*command: str, seconds: float = SECONDS, environment: Mapping[str, str] | None = None) -> Answer:
    """Run a program that may be missing, fail or hang.

    Args:
        command: the program and its arguments.
        seconds: after this time, the program and all processes it started are killed.
        environment: variables to set on top of this process's own.
    """
    program = os.path.basename(command[0])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"} | dict(environment or {}),
            start_new_session=True,
        )
    except FileNotFoundError:
        return Answer("", f"{program} is not on PATH", missing=True)
    except OSError as error:
        return Answer("", f"{program} cannot be started: {error.strerror}")
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as late:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # a process that waits for a device cannot be killed; don't wait for it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
        return Answer((late.stdout or b"").decode(errors="replace"), f"{program} gave no answer within {seconds:g} s")
    text = output.decode(errors="replace")
    code = process.returncode
    if code == 0:
        return Answer(text)
    said = [line.strip() for line in (errors.decode(errors="replace") + text).splitlines() if line.strip()]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = f": {said[-1].removeprefix(f'{program}: ')[:200]}" if said else ""
    return Answer(text, f"{program} {how}{last}")


def within(name: str, check: Callable[[], list[Finding]], seconds: float = HANGS_SECONDS) -> list[Finding]:
    """Run a check; if it hangs or raises, return a fault named `name` instead. A check that hangs is abandoned."""
    results: list[list[Finding]] = []

    def work() -> None:
        try:
            results.append(check())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            results.append([fault(name, f"{where}{error.strerror or error}", "Fix that, or do not use this machine.")])
        except Exception as error:
            found = f"cannot be checked: {type(error).__name__}: {error}"
            results.append([fault(name, found, "See what the error names; it does not affect the other findings.")])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    advice = "A file system or a name server hangs: do not use this machine, and tell its administrators."
    return [fault(name, f"no answer within {seconds:g} s", advice)]
