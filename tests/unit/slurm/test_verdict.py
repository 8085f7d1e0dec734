"""Why the ranks of an attempt ended, from what srun printed."""

from __future__ import annotations

import pytest

from lbr_dist.slurm.verdict import Verdict, numbers, verdict_of

PEER = "srun: error: n1: task 0: Exited with exit code 1"
WAITED = "srun: First task exited 5s ago"


@pytest.mark.parametrize(
    ("code", "lines", "outcome", "words", "blamed"),
    [
        (0, [], "finished", "", ()),
        (75, ["srun: error: n2: tasks 1-2: Exited with exit code 75", PEER], "interrupted", "saved", ()),
        (143, ["srun: error: n1: tasks 0-1: Terminated"], "interrupted", "asked to stop", ()),
        (140, ["srun: error: n1: task 0: User defined signal 2", PEER], "interrupted", "asked to stop", ()),
        (2, ["srun: error: n1: task 0: Exited with exit code 2", PEER], "mistaken", "", ()),
        (137, [PEER, "srun: error: n2: task 3: Killed"], "failed", "rank 3 on n2 was killed: Killed", ("n2",)),
        (139, ["srun: error: n2: task 3: Segmentation fault (core dumped)"], "failed", "Segmentation fault", ("n2",)),
        (137, ["srun: error: n1: task 0: Out Of Memory"], "failed", "Out Of Memory", ("n1",)),
        (70, ["srun: error: n1: tasks 0-1: Exited with exit code 70"], "failed", "no progress", ()),
        (
            137,
            ["srun: error: n1: task 0: Exited with exit code 70", WAITED, "srun: error: n3: task 1: Killed"],
            "failed",
            "rank 1 on n3 hung, and could not exit by itself",
            ("n3",),
        ),
        (
            137,
            [PEER, WAITED, "srun: StepId=1.0 task 1: running", "srun: error: n2: task 1: Killed"],
            "failed",
            "rank 0 on n1: Exited with exit code 1",
            (),
        ),
        (
            1,
            [PEER, WAITED, "srun: StepId=1.0 tasks 2-3: running", "srun: error: Timed out waiting for job step"],
            "failed",
            "n2 stopped responding: srun never learned how ranks 2, 3 ended",
            ("n2",),
        ),
        (1, ["srun: error: Node failure on n2"], "failed", "node n2 failed", ("n2",)),
        (1, ["srun: error: Unable to create step: Invalid"], "failed", "srun exited with code 1", ()),
    ],
)
def test_verdict(code: int, lines: list[str], outcome: str, words: str, blamed: tuple[str, ...]) -> None:
    found = verdict_of(code, lines, lambda rank: f"n{1 + rank // 2}")
    assert (found.outcome, found.blamed) == (outcome, blamed) and words in found.reason, found
    assert isinstance(found, Verdict)


def test_numbers() -> None:
    assert numbers("0,2-4,7") == {0, 2, 3, 4, 7}
