"""`lbr logs` of runs on this machine, without Slurm installed."""

from __future__ import annotations

import threading
import time

import pytest

from lbr_dist.launch import cli
from lbr_dist.launch.commands import logs
from lbr_dist.status import starts
from lbr_dist.storage.lock import run_lock
from tests.unit.launch.cases import message
from tests.unit.launch.commands.runs_here import make_run, write_log

pytestmark = pytest.mark.usefixtures("without_slurm")


def test_logs_of_the_stage_that_ran_last(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run("a")
    write_log(config, "represent", 0, ["of represent"], age=60)
    path = write_log(config, "learn", 0, ["one", "two", "three"])
    write_log(config, "learn", 1, ["the second rank"])
    assert cli.main(["logs", "runs/a", "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"==> {path.absolute()} <==", "two", "three"]
    assert cli.main(["logs", "runs/a", "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["the second rank"]
    assert cli.main(["logs", "runs/a", "--stage", "represent"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["of represent"]


def test_no_such_log(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run("a")
    assert "found no log of a rank. `lbr status` shows how far the run is" in message(capsys, "logs", "runs/a")
    write_log(config, "learn", 0, ["one"])
    write_log(config, "learn", 1, ["one"])
    said = message(capsys, "logs", "runs/a", "--rank", "4")
    assert "learn/logs/rank-4.log: no such log." in said and "rank-0.log, rank-1.log" in said


def test_following_a_log_ends_with_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LOOK_EVERY", 0.2)
    config = make_run("a")
    path = write_log(config, "learn", 0, ["one"])
    began = threading.Event()

    def work() -> None:
        with run_lock(config.run_path), starts.recorded(config.run_path, ["learn"], ["learn", "c.yaml"]):
            began.set()
            time.sleep(1.0)
            with path.open("a") as file:
                file.write("two\n")

    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(60)
    assert cli.main(["logs", "runs/a", "--follow"]) == 0
    thread.join()
    assert capsys.readouterr().out.splitlines()[1:] == ["one", "two"]
