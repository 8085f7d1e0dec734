"""`lbr status` of runs on this machine, without Slurm installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lbr_dist.launch import cli
from lbr_dist.launch.commands import status
from lbr_dist.status import starts
from lbr_dist.storage.lock import run_lock
from tests.unit.launch.cases import message
from tests.unit.launch.commands.runs_here import make_run, stop, submit, write_log

pytestmark = pytest.mark.usefixtures("without_slurm")


def test_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    stop(make_run("a"), "the data has changed")
    assert cli.main(["status", "runs/a"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(Path("runs/a").absolute()),
        "  learn      stopped",
        "             the data has changed",
        "             to resume  lbr learn c.yaml",
        "  represent  not started",
        "  evaluate   not started",
    ]
    assert cli.main(["status", "runs/a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found] == ["stopped", "not started", "not started"]


def test_all_runs_local_and_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be read, or whose Slurm does not answer, does not hide the others."""
    stop(make_run("a"), "first reason")
    damaged = make_run("b")
    (damaged.run_path / "config.yaml").write_text("lurn: 3\n")
    queued = make_run("c")
    (queued.run_path / "config.yaml").unlink()  # its job has not started
    (submit(queued).folder / "config-0.yaml").write_text("lurn: 3\n")
    stop(make_run("d"), "last reason")
    Path("runs/data").mkdir()
    assert cli.main(["status"]) == 0
    printed = capsys.readouterr().out
    runs = [line for line in printed.splitlines() if line.startswith("/")]
    assert runs == [str(Path("runs").absolute() / name) for name in "abcd"]
    assert "first reason" in printed and "last reason" in printed
    assert printed.count("unknown key `lurn`") == 2


def test_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/: found no run. Name a run folder" in message(capsys, "status")
    Path("nothing").mkdir()
    for command in ("status", "logs"):
        assert message(capsys, command, "nothing").startswith("error: nothing: found no run. Name a run folder")


def test_the_last_start_counts() -> None:
    """A run that was submitted, and then continued by a command on this machine; and the other way round."""
    config = make_run("a")
    folder = submit(config).folder
    assert status.is_submitted(config.run_path)
    os.utime(folder / "config-0.yaml", (time.time() - 60,) * 2)
    stop(config, "why")
    assert not status.is_submitted(config.run_path)
    os.utime(folder / "config-0.yaml", (time.time() + 60,) * 2)
    assert status.is_submitted(config.run_path)


def test_watching_ends_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a").run_path.absolute()
    ended = threading.Event()

    def work() -> None:
        with run_lock(run), starts.recorded(run, ["learn"], ["learn", "c.yaml"]):
            began.set()
            ended.wait(60)

    began = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(60)
    threading.Timer(1.0, ended.set).start()
    assert cli.main(["status", "runs/a", "--watch", "--every", "0.2"]) == 0
    thread.join()
    printed = capsys.readouterr().out
    assert printed.count("learn      running") >= 2 and printed.count("learn      not started") == 1


def test_neither_command_imports_torch(tmp_path: Path) -> None:
    write_log(make_run("a"), "learn", 0, ["here"])
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "assert cli.main(sys.argv[1:]) == 0\n"
        "sys.exit(str({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)).replace('set()', '') or 0)"
    )
    for command in ("status", "logs"):
        subprocess.run([sys.executable, "-c", code, command, str(tmp_path / "runs" / "a")], check=True, timeout=60)
