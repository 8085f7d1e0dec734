"""The scenarios of `scenarios/`, played together; each has a test of its own."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tests.slurm.scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(played: dict[str, Future[None]], name: str) -> None:
    played[name].result()
