"""One Slurm for all tests of this folder, and the runs that they compare with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.launch.config_file import write_config
from lbr_dist.launch.ranks import run_stage
from lbr_dist.slurm.testbed.bed import Bed, why_not
from tests.slurm import chains
from tests.slurm.chains import long_run
from tests.slurm.scenarios import SCENARIOS, Place

SMALL_DISK = "16m"
AT_ONCE = 3
"""Two cores start so many runs at a time without any of them missing a deadline."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
    # begun with the bed, and the longest: its end is waited for when all else is over
    items.sort(key=lambda item: item.name == "test_scenario[time_limits]")


@pytest.fixture(scope="session")
def small_disk() -> Iterator[Path]:
    """A disk that is soon full; mounted before the bed, whose daemons have their own view of mounts."""
    if os.geteuid() != 0:
        pytest.skip("a small disk is mounted by root")
    folder = Path(tempfile.mkdtemp(prefix="lbr-small-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture(scope="session")
def bed(small_disk: Path) -> Iterator[Bed]:
    """A Slurm that is up."""
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm test bed: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="lbr-bed-"))
    found = Bed(folder)
    found.up()
    chains.SHELL.update(found.environment)
    yield found
    found.down()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def whole(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Stage 1 of `long_run` on two ranks, without Slurm and without an interruption."""
    config = long_run(tmp_path_factory.mktemp("whole") / "run", tiny_model, tiny_data)
    path = config.run_path / "config.yaml"
    write_config(config, path)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # as on the test bed: sums have an order
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
    whole: RunConfig,
    tiny_model: Path,
    tiny_data: Path,
    small_disk: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[None]]]:
    """All scenarios whose tests were asked for, begun now, so many at once; the longest comes first."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = [str(item.callspec.params["name"]) for item in items if item.originalname == "test_scenario"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(
                SCENARIOS[name],
                Place(bed, whole, tiny_model, tiny_data, small_disk, tmp_path_factory.mktemp(name)),
            )
            for name in wanted
        }
