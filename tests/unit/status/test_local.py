"""The state of a run that a command started: from its lock, its last start and its files."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.file import write_config
from lbr_dist.errors import LaunchError
from lbr_dist.export import checksums
from lbr_dist.status import local, starts
from lbr_dist.status.rows import StageRow, table
from lbr_dist.storage.lock import LOCK, holder, run_lock
from tests.configs import tiny_run

ALL = ("learn", "represent", "evaluate")


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run folder with its config, and a stage 1 that has done two of its four steps."""
    config = tiny_run(tmp_path / "run", tmp_path, tmp_path)
    write_config(config, config.run_path / "config.yaml")
    write_steps(config, 2)
    return config


def write_steps(config: RunConfig, steps: int) -> None:
    config.stage_path("learn").mkdir(exist_ok=True)
    lines = [
        {"step": step, "loss": 3.0 - step, "seconds": 10.0, "tokens_per_second": 500.0} for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (config.stage_path("learn") / "metrics.jsonl").write_text('{"step": 0, "effective_rank": 9.0}\n' + text)


def finish(config: RunConfig) -> None:
    """What finished stages and an evaluation leave, as far as the status reads it."""
    for stage, model in (("learn", config.learn_export), ("represent", config.model_path)):
        model.mkdir(parents=True)
        (model / "lbr.json").write_text("{}")
        checksums.write_checksums(model)
        config.run_path.joinpath(stage).mkdir(exist_ok=True)
        (config.run_path / stage / checksums.SUMMARY).write_text("{}")
    config.report_path.mkdir()
    (config.report_path / "index.html").write_text("<html>")
    systems = {
        "bm25": {"ndcg@10": 0.4, "ndcg@10_interval": [0.3, 0.5]},
        "lbr": {"ndcg@10": 0.668, "ndcg@10_interval": [0.622, 0.71]},
    }
    metrics = {"model": checksums.identity(config.model_path), "systems": systems}
    (config.report_path / "metrics.json").write_text(json.dumps(metrics))


def states(config: RunConfig) -> list[str]:
    return [row.state for row in local.rows(config.run_path)]


def test_a_running_run(run: RunConfig) -> None:
    with run_lock(run.run_path), starts.recorded(run.run_path, ALL, ["run", "c.yaml"]):
        found = local.rows(run.run_path)
    assert [row.state for row in found] == ["running", "waiting", "waiting"]
    assert found[0].nodes == os.uname().nodename
    assert (found[0].step, found[0].steps, found[0].loss, found[0].rate) == (2, 4, 1.0, 500.0)
    assert found[0].rate_unit == "tokens/s" and found[0].left_seconds == 20.0
    assert found[1].reason == "for learn" and found[1].step is None
    assert "step 2/4  loss 1.0000  500 tokens/s  left 0:20" in table(found)


def test_a_stage_that_was_not_asked_for_is_not_waiting(run: RunConfig) -> None:
    with run_lock(run.run_path), starts.recorded(run.run_path, ["learn"], ["learn", "c.yaml"]):
        assert states(run) == ["running", "not started", "not started"]


def test_an_error_is_the_reason(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.run_path.parent)
    arguments = ["run", "a config.yaml", "--ranks", "2"]
    with pytest.raises(LaunchError), run_lock(run.run_path), starts.recorded(run.run_path, ALL, arguments):
        raise LaunchError("learn: rank 1 ended\nits log", reason="the data has changed")
    first, second, third = local.rows(run.run_path)
    assert (first.state, first.reason, first.left_seconds) == ("stopped", "the data has changed", None)
    assert first.resume == "lbr run 'a config.yaml' --ranks 2"
    assert (second.state, third.state, second.reason, second.resume) == ("not started", "not started", "", "")
    monkeypatch.chdir("/")
    assert local.rows(run.run_path)[0].resume == f"cd {run.run_path.parent} && lbr run 'a config.yaml' --ranks 2"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LaunchError("one\ntwo"), "one"),
        (KeyboardInterrupt(), "by a second Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_the_reason_is_one_line(run: RunConfig, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), starts.recorded(run.run_path, ALL, ["run", "c.yaml"]):
        raise error
    assert local.rows(run.run_path)[0].reason == reason


def test_other_launchers_are_named(run: RunConfig) -> None:
    with pytest.raises(LaunchError), starts.recorded(run.run_path, ALL, ["run", "c.yaml"], "torchrun"):
        raise LaunchError("why")
    assert local.rows(run.run_path)[0].resume == "lbr run c.yaml    (under torchrun, on every rank)"


def test_a_killed_run(run: RunConfig) -> None:
    """Its lock says that it runs, and then that it does not, though it could record nothing."""
    code = (
        "import sys, time; from pathlib import Path; from lbr_dist.status import starts\n"
        "from lbr_dist.storage.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])), starts.recorded(Path(sys.argv[1]), ['learn'], ['learn', 'c.yaml']):\n"
        "    print('locked', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.run_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        who = holder(run.run_path)
        assert who is not None and who.process == process.pid
        assert states(run)[0] == "running"
        process.send_signal(signal.SIGKILL)
    row = local.rows(run.run_path)[0]
    assert row.state == "stopped" and row.reason.startswith("it was killed, or its machine went down")
    assert row.resume == "lbr learn c.yaml"


def test_a_run_of_an_earlier_version(run: RunConfig) -> None:
    """It has recorded no start."""
    with run_lock(run.run_path):
        assert states(run) == ["running", "waiting", "waiting"]
    row = local.rows(run.run_path)[0]
    assert (row.state, row.step) == ("stopped", 2)
    assert row.resume == f"lbr run {run.run_path / 'config.yaml'}"
    (run.stage_path("learn") / "metrics.jsonl").unlink()
    assert states(run) == ["not started"] * 3


def test_a_finished_run_shows_what_it_has_given(run: RunConfig) -> None:
    finish(run)
    write_steps(run, 4)
    with starts.recorded(run.run_path, ALL, ["run", "c.yaml"]):
        pass
    found = local.rows(run.run_path)
    assert [row.state for row in found] == ["finished"] * 3
    assert (found[0].step, found[0].model, found[0].score) == (4, "", None)
    last: dict[str, Any] = dataclasses.asdict(found[2])
    assert last["score"] == 0.668 and last["score_interval"] == (0.622, 0.71)
    assert last["model"] == str(run.model_path) and last["report"] == str(run.report_path / "index.html")
    shown = table(found)
    assert "nDCG@10    0.668 (0.622 to 0.710)" in shown and f"model      {run.model_path}" in shown
    # the same without the system that was trained
    (run.report_path / "metrics.json").write_text(
        json.dumps({"model": checksums.identity(run.model_path), "systems": {}})
    )
    assert local.rows(run.run_path)[2].score is None and local.rows(run.run_path)[2].model == str(run.model_path)


def test_a_run_without_an_evaluation_shows_its_model(run: RunConfig) -> None:
    alone = dataclasses.replace(run, data=dataclasses.replace(run.data, test=None))
    write_config(alone, run.run_path / "config.yaml")
    finish(run)
    found = local.rows(run.run_path)
    assert [(row.stage, row.model) for row in found] == [("learn", ""), ("represent", str(run.model_path))]


def test_a_stage_that_stopped_after_another_was_finished(run: RunConfig) -> None:
    finish(run)
    (run.report_path / "index.html").unlink()
    with pytest.raises(LaunchError), starts.recorded(run.run_path, ALL, ["run", "c.yaml"]):
        raise LaunchError("no room")
    assert states(run) == ["finished", "finished", "stopped"]


def test_no_locks_in_the_file_system(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    (run.run_path / LOCK).touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    row = local.rows(run.run_path)[0]
    assert row.state == "unknown" and "its file system has no locks" in row.reason


def test_looking_at_the_lock_does_not_refuse_a_run_that_starts(run: RunConfig) -> None:
    (run.run_path / LOCK).touch()
    with (run.run_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        began = time.monotonic()
        with run_lock(run.run_path):
            assert time.monotonic() - began >= 0.1
        timer.join()


def test_a_row_of_a_run_that_cannot_be_read() -> None:
    assert table([StageRow("/runs/a", "", "", "unknown", reason="why")]) == f"/runs/a\n{'':<13}why"
