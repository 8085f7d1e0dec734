"""Is the evaluation finished?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.export import checksums
from lbr_dist.status.stages import is_finished
from tests.configs import tiny_run


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
    assert is_finished(evaluated, "evaluate")
    os.utime(evaluated.report_path / "metrics.json", (1, 1))  # a copy of the folder may have any times
    assert is_finished(evaluated, "evaluate")


def test_an_evaluation_without_its_page_is_not_finished(evaluated: RunConfig) -> None:
    """The page is written last: a job killed before that left the metrics alone."""
    (evaluated.report_path / "index.html").unlink()
    assert not is_finished(evaluated, "evaluate")


def test_an_evaluation_of_another_model_is_not_finished(evaluated: RunConfig) -> None:
    (evaluated.model_path / "lbr.json").write_text('{"pooling": "mean"}')
    checksums.write_checksums(evaluated.model_path)
    assert not is_finished(evaluated, "evaluate")
    (evaluated.model_path / "checksums.json").unlink()
    assert not is_finished(evaluated, "evaluate")


def test_a_report_of_an_earlier_version_is_judged_by_its_time(evaluated: RunConfig) -> None:
    write_report(evaluated, {"domain": "tiny"})
    assert is_finished(evaluated, "evaluate")
    os.utime(evaluated.report_path / "metrics.json", (1, 1))
    assert not is_finished(evaluated, "evaluate")
