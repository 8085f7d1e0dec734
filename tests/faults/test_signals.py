"""Stopping: by a signal to any rank, at any time and any number of times, or because one rank sees the time limit near.
All ranks stop together, and save.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.file import write_config
from lbr_dist.errors import EXIT_INTERRUPTED, Interrupted
from lbr_dist.ranks import interrupt
from lbr_dist.status import local
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, checkpoints, losses, run, workers
from tests.faults.waits import Ended
from tests.ranks import RankPool

CASES = [
    ("signals_in_backward", 1, {"call": 3, "name": "SIGTERM"}),
    pytest.param("signals_in_backward", 0, {"call": 3, "name": "SIGINT"}, marks=pytest.mark.slow),
    ("signals_in_save", 1, {"step": 2, "name": "SIGUSR2"}),
    ("limit_ahead", 1, {"call": 3}),
]


@pytest.mark.parametrize(("point", "rank", "more"), CASES)
def test_one_rank_is_asked_to_stop(
    two_ranks: RankPool, whole: RunConfig, broken: RunConfig, point: str, rank: int, more: dict[str, object]
) -> None:
    # in the background, a save that starts late could get the signal after the last step
    settings = dataclasses.replace(broken.checkpoint, background=point != "signals_in_save")
    with pytest.raises(Interrupted):
        run(dataclasses.replace(broken, checkpoint=settings), rank=rank, point=point, **more)
    done = losses(broken)[-1][0]
    assert 0 < done < 6
    assert checkpoints(broken).verify(done).state["step"] == done
    assert not (broken.learn_export / "lbr.json").exists()
    two_ranks.run(on_ranks.stage, config=broken, name="learn")
    assert_same_end(broken, whole)


def test_the_launcher_is_asked_to_stop(two_ranks: RankPool, whole: RunConfig, tmp_path: Path) -> None:
    """`lbr` passes the signal on, waits for the save, and exits with the code that asks for a restart."""
    longer = dataclasses.replace(whole.learn, steps=100)
    whole, broken = (dataclasses.replace(whole, run_dir=str(tmp_path / n / "run"), learn=longer) for n in "ab")
    two_ranks.run(on_ranks.stage, config=whole, name="learn")
    path = broken.run_path.parent / "config.yaml"
    write_config(broken, path)
    command = [sys.executable, "-m", "lbr_dist.launch.cli", "learn", str(path), "--ranks=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(lambda: 2 in checkpoints(broken).steps(), process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert "learn: stopped by SIGTERM after step" in printed and "Traceback" not in printed
    assert not workers(broken.run_path)
    (row, *_) = local.rows(broken.run_path)
    assert row.state == "stopped" and row.reason.startswith("learn: stopped by SIGTERM after step "), row
    assert row.resume == f"lbr learn {path} --ranks=2"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed after step {printed.split('after step ')[1].split(',')[0]} from" in done.stderr
    assert_same_end(broken, whole)


@pytest.mark.parametrize("waited", ["ctrl_c_twice"], indirect=True)
def test_ctrl_c_twice_ends_at_once(waited: Ended) -> None:
    assert waited.code == 130, waited.printed
    assert not waited.left


def test_a_rank_stops_before_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest of the last steps and a save, times 1.5, must fit into the time that is left."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = interrupt.StopRequest()

    def after(step: float, save: float, left: float | str) -> str | None:
        nonlocal now
        now += step
        end = left if isinstance(left, str) else str(time.time() + left)
        monkeypatch.setenv(interrupt.END_TIME, end)
        stop.look_ahead(save)
        return stop.name

    assert after(10, 20, "") is None and after(10, 20, "not a number") is None
    assert after(10, 0, 20) is None, "nothing was saved yet"
    assert after(10, 20, 50) is None
    assert after(10, 20, -5) is None, "a limit in the past belongs to another job"
    assert after(1, 20, 40) == "the time limit, 40 s ahead,", "the longest of the last steps counts"
    stop = interrupt.StopRequest()
    stop.take(signal.SIGTERM, None)
    assert after(10, 20, 1) == "SIGTERM"


def _wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
