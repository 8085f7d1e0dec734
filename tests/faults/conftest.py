"""The uninterrupted run whose result every interrupted run must reproduce."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lbr_dist.config import CheckpointConfig, RunConfig
from tests.configs import tiny_run
from tests.distributed import on_ranks
from tests.faults.waits import WAITS, Ended
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def whole(
    two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Stage 1 in six steps, with a checkpoint every two steps, all kept; run to its end."""
    config = tiny_run(tmp_path_factory.mktemp("whole") / "run", tiny_model, tiny_data)
    config = dataclasses.replace(
        config,
        learn=dataclasses.replace(config.learn, steps=6),
        checkpoint=CheckpointConfig(every_steps=2, keep=3),
    )
    two_ranks.run(on_ranks.stage, config=config, name="learn")
    return config


@pytest.fixture
def broken(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """The same run, not started yet, in its own folder."""
    return dataclasses.replace(whole, run_dir=str(tmp_path / "run"))


@pytest.fixture(scope="session", autouse=True)
def waits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """The runs of `waits.py` that the selected tests need, started before the first test of this folder."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = [str(item.callspec.params["waited"]) for item in items if "waited" in item.fixturenames]
    with ThreadPoolExecutor(len(WAITS)) as pool:
        found: dict[str, Future[Ended]] = {}
        for name in wanted:
            place = tmp_path_factory.mktemp(name) / "run"
            config = dataclasses.replace(request.getfixturevalue("whole"), run_dir=str(place))
            found[name] = pool.submit(WAITS[name], config)
        yield found


@pytest.fixture
def waited(request: pytest.FixtureRequest, waits: dict[str, Future[Ended]]) -> Ended:
    """How the run that the test names ended; waits for its end."""
    return waits[request.param].result()
