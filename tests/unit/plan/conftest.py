"""The base model of the planner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.plan.cases import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the config of Qwen2.5-7B in it."""
    return write_base(tmp_path_factory.mktemp("qwen"))
