"""A config with its own copies of model and data, for tests of what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lbr_dist.config import RunConfig, to_dict
from tests.configs import tiny_run


@pytest.fixture
def run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> tuple[Path, RunConfig]:
    """A valid config file, with copies of model and data that a test may damage."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(tiny_data, tmp_path / "data")
    config = tiny_run(tmp_path / "run", tmp_path / "model", tmp_path / "data")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path, config
