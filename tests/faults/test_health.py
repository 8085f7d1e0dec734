"""A rank that hangs, dies or computes nonsense: a clean end within the deadline, or the same skip on every rank."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.errors import LaunchError
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, checkpoints, losses, run, workers
from tests.faults.waits import Ended
from tests.ranks import RankPool

SLACK = 90.0  # beyond the deadline: the ranks start beside others, and the launcher waits before it kills a rank


@pytest.mark.parametrize(
    ("waited", "seen"),
    [("hangs", "backward"), ("hangs_in_c", "_held_interpreter"), ("stopped", "")],
    indirect=["waited"],
)
def test_a_rank_hangs(two_ranks: RankPool, whole: RunConfig, waited: Ended, seen: str) -> None:
    broken = waited.config
    assert waited.error is not None and waited.error[0] == "LaunchError"
    assert re.search(r"rank \d made no progress and exited; .*\.stacks", waited.error[1])
    assert waited.seconds < 60 * broken.cluster.timeout_minutes + SLACK
    assert not waited.left
    stacks = [(broken.stage_path("learn") / "logs" / f"rank-{rank}.stacks").read_text() for rank in range(2)]
    assert all("Thread 0x" in text and "on_ranks" not in text for text in stacks)
    assert "trainer.py" in stacks[0] and seen in stacks[1]
    if seen == "backward":
        two_ranks.run(on_ranks.stage, config=broken, name="learn")
        assert_same_end(broken, whole)


def test_a_rank_dies(broken: RunConfig, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="rank 1 was killed by signal SIGKILL"):
        run(broken, rank=1, point="killed_in_backward", call=5)
    assert not workers(broken.run_path)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err, "the surviving rank's error was printed"


def test_one_rank_has_nan_once(whole: RunConfig, broken: RunConfig) -> None:
    """All ranks skip the step; the run continues, and the loss still falls."""
    run(broken, rank=1, point="not_a_number", call=3)
    lines = (broken.stage_path("learn") / "metrics.jsonl").read_text().splitlines()
    skipped = [row["step"] for row in map(json.loads, lines) if row.get("skipped")]
    assert len(skipped) == 1
    before = [row[:2] for row in losses(whole) if row[0] < skipped[0]]
    assert before == [row[:2] for row in losses(broken) if row[0] < skipped[0]]
    assert losses(broken)[-1][1] < losses(broken)[0][1]


def test_one_rank_has_nan_from_some_step_on(
    two_ranks: RankPool, whole: RunConfig, broken: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """After `most_skipped` skipped steps in a row the run ends, and names the last good checkpoint."""
    optimizer = dataclasses.replace(broken.learn.optimizer, most_skipped=2)
    broken = dataclasses.replace(broken, learn=dataclasses.replace(broken.learn, optimizer=optimizer))
    with pytest.raises(LaunchError):
        run(broken, rank=1, point="not_a_number_any_more", call=3)  # of step 2
    printed = capfd.readouterr().err
    assert "2 steps in a row were skipped" in printed
    good = checkpoints(broken).complete()[-1]
    assert f"The last good checkpoint is {checkpoints(broken).folder(good.step)}" in printed
    lines = (broken.stage_path("learn") / "metrics.jsonl").read_text().splitlines()
    first_bad = min(row["step"] for row in map(json.loads, lines) if row.get("skipped"))
    assert first_bad == 2 and good.step == 2
    assert good.state["skipped"] == 1 and good.state["optimizer_steps"] == 1, "not saved between the bad steps"
