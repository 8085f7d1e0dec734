"""The scenarios of `scenarios.py`, played together; each has a test of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.slurm.testbed.bed import Bed
from tests.slurm.scenarios import SCENARIOS, Place

AT_ONCE = 3
"""Two cores start so many ranks without any of them missing a deadline; the longest scenario is the first."""


@pytest.fixture(scope="module")
def played(
    request: pytest.FixtureRequest,
    bed: Bed,
    whole: RunConfig,
    tiny_model: Path,
    tiny_data: Path,
    small_disk: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[None]]]:
    """All that were asked for, begun at the same time."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.name.startswith("test_scenario[")
    ]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(
                SCENARIOS[name],
                Place(bed, whole, tiny_model, tiny_data, small_disk, tmp_path_factory.mktemp(name)),
            )
            for name in wanted
        }
    bed.wait_idle()


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(played: dict[str, Future[None]], name: str) -> None:
    played[name].result()
