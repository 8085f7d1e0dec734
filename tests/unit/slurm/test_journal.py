"""The records of submissions and attempts in a run folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.errors import ConfigError
from lbr_dist.export import checksums
from lbr_dist.slurm import journal
from lbr_dist.slurm.journal import Point, Submission
from tests.configs import tiny_run


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


# ---- is the evaluation finished? ------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path) -> RunConfig:
    """A run whose model was exported and evaluated."""
    config = tiny_run(tmp_path / "run", tmp_path, tmp_path)
    config.model_path.mkdir(parents=True)
    (config.model_path / "lbr.json").write_text("{}")
    checksums.write_checksums(config.model_path)
    write_report(config, {"model": checksums.identity(config.model_path)})
    return config


def write_report(config: RunConfig, metrics: dict[str, object]) -> None:
    config.report_path.mkdir(exist_ok=True)
    (config.report_path / "metrics.json").write_text(json.dumps(metrics))
    (config.report_path / "index.html").write_text("<html>")


def test_an_evaluation_with_its_page_is_finished(evaluated: RunConfig) -> None:
    assert journal.is_finished(evaluated, "evaluate")
    os.utime(evaluated.report_path / "metrics.json", (1, 1))  # a copy of the folder may have any times
    assert journal.is_finished(evaluated, "evaluate")


def test_an_evaluation_without_its_page_is_not_finished(evaluated: RunConfig) -> None:
    """The page is written last: a job killed before that left the metrics alone."""
    (evaluated.report_path / "index.html").unlink()
    assert not journal.is_finished(evaluated, "evaluate")


def test_an_evaluation_of_another_model_is_not_finished(evaluated: RunConfig) -> None:
    (evaluated.model_path / "lbr.json").write_text('{"pooling": "mean"}')
    checksums.write_checksums(evaluated.model_path)
    assert not journal.is_finished(evaluated, "evaluate")
    (evaluated.model_path / "checksums.json").unlink()
    assert not journal.is_finished(evaluated, "evaluate")


def test_a_report_of_an_earlier_version_is_judged_by_its_time(evaluated: RunConfig) -> None:
    write_report(evaluated, {"domain": "tiny"})
    assert journal.is_finished(evaluated, "evaluate")
    os.utime(evaluated.report_path / "metrics.json", (1, 1))
    assert not journal.is_finished(evaluated, "evaluate")
