"""The corpus and the pairs that the tests of mining share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.mining.cases import write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)
