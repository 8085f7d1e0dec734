"""The records of submissions and attempts in a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_dist.errors import ConfigError
from lbr_dist.slurm import journal
from lbr_dist.slurm.journal import Point, Submission


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Submission(tmp_path, "/work", "/usr/bin/python3", {"learn": "7"}, (Point("seed=1", "/runs/a"),), "today")
    written.write()
    assert Submission.read(tmp_path) == written


def test_unknown_keys_of_a_submission_are_ignored(tmp_path: Path) -> None:
    """Earlier versions wrote a key `created`."""
    written = Submission(tmp_path, "/work", "/usr/bin/python3", {"learn": "7"}, (Point("", "/runs/a"),))
    written.write()
    content = json.loads((tmp_path / "chain.json").read_text())
    assert "created" not in content
    (tmp_path / "chain.json").write_text(json.dumps(content | {"created": "2026-01-02T03:04:05+00:00"}))
    assert Submission.read(tmp_path) == written


def test_a_submission_without_its_jobs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text('{"working_folder": "/work", "python": "python3", "points": []}')
    with pytest.raises(ConfigError, match=r"chain.json: cannot be read"):
        Submission.read(tmp_path)


def test_a_line_that_was_cut_off_is_skipped(tmp_path: Path) -> None:
    journal.begin(tmp_path, "learn", "7", "n1", 0)
    journal.end(tmp_path, "learn", "failed", "why", 5, ["n1"])
    with (tmp_path / "slurm" / "tries.jsonl").open("a") as file:
        file.write('{"event": "beg\n')
    journal.begin(tmp_path, "learn", "7", "n2", 5)
    first, second = journal.tries(tmp_path, "learn")
    assert (first.outcome, first.last_step, first.blamed, second.outcome) == ("failed", 5, ["n1"], "")
