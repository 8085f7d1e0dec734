"""The state of a submitted run whose jobs Slurm has forgotten."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lbr_dist.config.file import write_config
from lbr_dist.export import checksums
from lbr_dist.slurm import status
from lbr_dist.slurm.journal import Point, Submission
from tests.configs import tiny_run


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that knows no job any more, and no accounting."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.usefixtures("forgetful")
def test_a_finished_chain_shows_what_it_has_given(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", tmp_path, tmp_path)
    folder = config.run_path / "slurm" / "001"
    folder.mkdir(parents=True)
    write_config(config, folder / "config-0.yaml")
    jobs = {"learn": "7", "represent": "8", "evaluate": "9"}
    Submission(folder, "/work", sys.executable, jobs, (Point("", str(config.run_path)),)).write()  # type: ignore[arg-type]
    assert [row.state for row in status.rows(config.run_path)] == ["unknown"] * 3
    for stage, model in (("learn", config.learn_export), ("represent", config.model_path)):
        (config.run_path / stage).mkdir(exist_ok=True)
        (config.run_path / stage / checksums.SUMMARY).write_text("{}")
        model.mkdir(parents=True)
        (model / "lbr.json").write_text("{}")
        checksums.write_checksums(model)
    config.report_path.mkdir()
    (config.report_path / "index.html").write_text("<html>")
    systems = {"lbr": {"ndcg@10": 0.668, "ndcg@10_interval": [0.622, 0.71]}}
    metrics = {"model": checksums.identity(config.model_path), "systems": systems}
    (config.report_path / "metrics.json").write_text(json.dumps(metrics))
    found = status.rows(config.run_path)
    assert [row.state for row in found] == ["finished"] * 3
    assert [row.score for row in found] == [None, None, 0.668]
    assert found[2].model == str(config.model_path) and found[2].report == str(config.report_path / "index.html")
