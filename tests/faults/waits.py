"""Runs that spend most of their time waiting for a deadline; they wait in the background, while other tests run.

They start one at a time, because the start is what needs the cores. Each has a test that checks what it left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from lbr_dist.config import RunConfig
from lbr_dist.config.file import write_config
from tests.faults.launcher import ENDED
from tests.faults.runs import checkpoints, workers
from tests.faults.worker import VARIABLE

_STARTING = threading.Lock()


@dataclasses.dataclass
class Ended:
    """How a run ended."""

    config: RunConfig
    seconds: float
    """From its start until its launcher exited."""
    code: int
    printed: str
    error: tuple[str, str] | None
    """Name and text of what the launcher raised."""
    left: list[int]
    """Processes that still worked for the run after its launcher had exited."""


def _play(
    config: RunConfig,
    command: list[str],
    begun: Callable[[], bool],
    then: Callable[[subprocess.Popen[bytes]], None],
    fault: object = None,
) -> Ended:
    """Start a launcher, do something to it when its run has begun, and wait for its end."""
    printed = config.run_path.parent / "printed"
    with printed.open("wb") as output:
        with _STARTING:
            began = time.monotonic()
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {VARIABLE: json.dumps(fault)},
                start_new_session=True,
            )
            try:
                while not begun():
                    assert process.poll() is None and time.monotonic() < began + 120, printed.read_text()
                    time.sleep(0.01)
            except BaseException:
                process.kill()
                raise
        try:
            then(process)
            code = process.wait(timeout=60)
        finally:
            process.kill()  # if it is still running; its ranks die with it
    seconds = time.monotonic() - began
    ended = config.run_path / ENDED
    error = tuple(json.loads(ended.read_text())) if ended.exists() else None
    return Ended(config, seconds, code, printed.read_text(), error, workers(config.run_path))


def hangs(config: RunConfig, point: str) -> Ended:
    """Rank 1 hangs in its third step; both ranks have half a minute to notice."""
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, timeout_minutes=0.5))
    path, folder = config.run_path / "config.yaml", config.stage_path("learn")
    write_config(config, path)
    command = [sys.executable, "-m", "tests.faults.launcher", "learn", str(path), "2", str(folder / "logs")]
    fault = {"rank": 1, "point": point, "call": 5}
    return _play(config, command, (folder / "metrics.jsonl").exists, lambda process: None, fault)


def ctrl_c_twice(config: RunConfig) -> Ended:
    """Press Ctrl-C twice in a launcher whose ranks do not react to signals."""
    path = config.run_path.parent / "config.yaml"
    write_config(config, path)
    command = [sys.executable, "-m", "lbr_dist.launch.cli", "learn", str(path), "--ranks=2", "--learn.steps=100000"]

    def press(process: subprocess.Popen[bytes]) -> None:
        for rank in workers(config.run_path):
            os.kill(rank, signal.SIGSTOP)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)

    return _play(config, command, lambda: 2 in checkpoints(config).steps(), press)


WAITS: dict[str, Callable[[RunConfig], Ended]] = {
    "hangs": lambda config: hangs(config, "hangs"),
    "hangs_in_c": lambda config: hangs(config, "hangs_in_c"),
    "stopped": lambda config: hangs(config, "stopped"),
    "ctrl_c_twice": ctrl_c_twice,
}
"""By the name that a test passes to `waited`."""
