"""Runs that wait most of their time for a deadline: they wait in the background, while other tests work.

One starts at a time, because it is the start that wants the cores; each has a test that judges what it left.
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
    """From its start to the end of its launcher."""
    code: int
    printed: str
    error: tuple[str, str] | None
    """Name and text of what the launcher raised."""
    left: list[int]
    """Processes that still worked for the run when its launcher had ended."""


def _play(
    config: RunConfig,
    command: list[str],
    begun: Callable[[], bool],
    then: Callable[[subprocess.Popen[bytes]], None],
    fault: object = None,
) -> Ended:
    """Start a launcher, and when its run has begun do something to it, and wait for its end."""
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
            process.kill()  # where it has not ended; its ranks die with it
    seconds = time.monotonic() - began
    ended = config.run_path / ENDED
    error = tuple(json.loads(ended.read_text())) if ended.exists() else None
    return Ended(config, seconds, code, printed.read_text(), error, workers(config.run_path))


def hangs(config: RunConfig, point: str) -> Ended:
    """Rank 1 stops making progress in its third step; both ranks have half a minute to notice."""
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, timeout_minutes=0.5))
    path, folder = config.run_path / "config.yaml", config.stage_path("learn")
    write_config(config, path)
    command = [sys.executable, "-m", "tests.faults.launcher", "learn", str(path), "2", str(folder / "logs")]
    fault = {"rank": 1, "point": point, "call": 5}
    return _play(config, command, (folder / "metrics.jsonl").exists, lambda process: None, fault)


def ctrl_c_twice(config: RunConfig) -> Ended:
    """To a launcher whose ranks cannot stop politely."""
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
"""By the name with which a test asks for `waited`."""
