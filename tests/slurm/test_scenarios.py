"""The scenarios of `scenarios/`, which run at the same time; each has its own test."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tests.slurm.scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(played: dict[str, Future[None]], name: str) -> None:
    played[name].result()
