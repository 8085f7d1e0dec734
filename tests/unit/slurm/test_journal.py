"""The records of submissions and attempts in a run folder."""

from __future__ import annotations

from pathlib import Path

from lbr_dist.slurm import journal


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    journal.begin(tmp_path, "learn", "7", "n1", 0)
    journal.end(tmp_path, "learn", "failed", "why", 5, ["n1"])
    with (tmp_path / "slurm" / "tries.jsonl").open("a") as file:
        file.write('{"event": "beg\n')
    journal.begin(tmp_path, "learn", "7", "n2", 5)
    first, second = journal.tries(tmp_path, "learn")
    assert (first.outcome, first.last_step, first.blamed, second.outcome) == ("failed", 5, ["n1"], "")
