"""One Slurm for all tests of this folder, and the scenarios that run on it beside the rest of the suite.

A plugin, not a conftest: its first fixture runs before all tests, wherever they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.config.file import write_config
from lbr_dist.launch.local_ranks import run_stage
from lbr_dist.slurm.testbed.bed import Bed, why_not
from tests.slurm import chains
from tests.slurm.chains import long_run
from tests.slurm.scenarios import ALONE, SCENARIOS
from tests.slurm.scenarios.place import Place

SMALL_DISK = "16m"
AT_ONCE = 2
"""Scenarios at once. Two cores can start this many runs beside the other tests without missing a deadline."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm tests go last: their runs start before the first test, and go on beside the others."""
    for item in items:
        if _is_ours(item):
            item.add_marker(pytest.mark.slurm)
    items.sort(key=_is_ours)


def _is_ours(item: pytest.Item) -> bool:
    return Path(__file__).parent in item.path.parents


@pytest.fixture(scope="session", autouse=True)
def _begun(request: pytest.FixtureRequest) -> None:
    if any(_is_ours(item) for item in request.session.items) and why_not() is None:
        with contextlib.suppress(Exception):  # tests that use the fixture raise the error again
            request.getfixturevalue("played")


@pytest.fixture(scope="session")
def small_disk() -> Iterator[Path]:
    """A disk that fills up quickly; mounted before the test bed, whose daemons have their own view of mounts."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = Path(tempfile.mkdtemp(prefix="lbr-small-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture(scope="session")
def bed(small_disk: Path) -> Iterator[Bed]:
    """A running Slurm."""
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm test bed: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="lbr-bed-"))
    found = Bed(folder, niceness=10)
    found.up()
    chains.SHELL.update(found.environment)
    yield found
    found.down()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def uninterrupted(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Stage 1 of `long_run` on two ranks, without Slurm and without an interruption."""
    config = long_run(tmp_path_factory.mktemp("whole") / "run", tiny_model, tiny_data)
    path = config.run_path / "config.yaml"
    write_config(config, path)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # as on the test bed: the order of sums depends on it
    try:
        run_stage("learn", path, 2, config.stage_path("learn") / "logs")
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return config


@pytest.fixture(scope="session")
def played(
    request: pytest.FixtureRequest,
    bed: Bed,
    uninterrupted: RunConfig,
    tiny_model: Path,
    tiny_data: Path,
    small_disk: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Any]]]:
    """All scenarios that the chosen tests need, started now: `AT_ONCE` at a time, then those that run alone."""
    ours = [item for item in request.session.items if _is_ours(item) and isinstance(item, pytest.Function)]
    chosen = {str(item.callspec.params["name"]) for item in ours if item.originalname == "test_scenario"}
    chosen |= {"chain"} if any(item.path.name == "test_chain.py" for item in ours) else set()

    def begin(pool: ThreadPoolExecutor, name: str, after: list[Future[Any]]) -> Future[Any]:
        place = Place(bed, uninterrupted, tiny_model, tiny_data, small_disk, tmp_path_factory.mktemp(name))

        def play() -> Any:
            wait(after)
            return SCENARIOS[name](place)

        return pool.submit(play)

    with ThreadPoolExecutor(AT_ONCE) as together, ThreadPoolExecutor(1) as alone:
        long_first = sorted(SCENARIOS, key=lambda name: name not in ("time_limits", "chain"))
        found = {name: begin(together, name, []) for name in long_first if name in chosen - ALONE}
        others = list(found.values())
        found |= {name: begin(alone, name, others) for name in SCENARIOS if name in chosen & ALONE}
        yield found
