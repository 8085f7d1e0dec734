"""Two jobs cannot train into one run folder, however they are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.file import write_config
from lbr_dist.errors import LaunchError
from lbr_dist.storage.lock import run_lock
from tests.faults.runs import workers


def command(config: RunConfig, *more: str) -> list[str]:
    path = config.run_path.parent / "config.yaml"
    write_config(config, path)
    return [sys.executable, "-m", "lbr_dist.launch.cli", "learn", str(path), "--ranks=1", *more]


def test_a_second_job_is_refused(broken: RunConfig) -> None:
    """Both by the launcher and where torchrun starts the ranks; the first one's files stay as they are."""
    with run_lock(broken.run_path):
        before = {path: path.read_bytes() for path in broken.run_path.rglob("*") if path.is_file()}
        for more in ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
            done = subprocess.run(
                command(broken), capture_output=True, text=True, timeout=120, env=os.environ | more, check=False
            )
            assert done.returncode == 1, done.stdout
            assert f"another job is training in this run folder: process {os.getpid()} on " in done.stderr
        assert not (broken.stage_path("learn") / "metrics.jsonl").exists()
        assert {path: path.read_bytes() for path in before} == before
    with run_lock(broken.run_path):
        pass


def test_the_ranks_hold_it_when_the_launcher_is_gone(broken: RunConfig) -> None:
    process = subprocess.Popen(
        command(broken, "--learn.steps=100000"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(workers(broken.run_path)) < 1:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        (rank,) = workers(broken.run_path)
        held = [os.path.realpath(f"/proc/{rank}/fd/{fd}") for fd in os.listdir(f"/proc/{rank}/fd")]
        assert str(broken.run_path / ".lock") in held
        with pytest.raises(LaunchError, match=f"process {process.pid} on "), run_lock(broken.run_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while workers(broken.run_path):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)
    with run_lock(broken.run_path):
        pass


def test_no_locks_in_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path / "run"):
        pass
    assert "its file system has no locks, so nothing stops a second job" in capfd.readouterr().err
