"""A full, read-only or slow disk: a failed save is logged as a warning, and loses nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig
from lbr_dist.errors import LaunchError
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, checkpoints, run
from tests.ranks import RankPool


@pytest.fixture
def small_disk(whole: RunConfig, broken: RunConfig) -> Iterator[Path]:
    """A separate disk for the checkpoints, with room for one and a half."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    one = checkpoints(whole).read(2).num_bytes
    place = checkpoints(broken).path
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={one * 3 // 2},mode=755", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


@pytest.mark.parametrize(
    "looks", [pytest.param(True, marks=pytest.mark.slow), False], ids=["seen before", "met while writing"]
)
def test_full(
    two_ranks: RankPool,
    whole: RunConfig,
    broken: RunConfig,
    small_disk: Path,
    capfd: pytest.CaptureFixture[str],
    looks: bool,
) -> None:
    with pytest.raises(LaunchError):
        run(broken, rank=0, point="slow_disk" if looks else "no_look_at_the_space", step=2, seconds=0)
    printed = "".join(capfd.readouterr())
    for step in (4, 6):
        assert f"warning: no checkpoint of step {step}: " in printed
    assert ("are free" if looks else "No space left on device") in printed
    assert f"the last one is {checkpoints(broken).folder(2)}" in printed
    assert "all 6 steps are done, but the last checkpoint cannot be saved" in printed
    assert checkpoints(broken).verify(2) and checkpoints(broken).steps() == [2]
    _mount(small_disk, "size=64m")
    two_ranks.run(on_ranks.stage, config=broken, name="learn")
    assert_same_end(broken, whole)


def test_read_only(
    two_ranks: RankPool, whole: RunConfig, broken: RunConfig, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _mount(small_disk, "size=64m")
    with pytest.raises(LaunchError):
        run(broken, rank=0, point="read_only_from", step=4, mount=str(small_disk))
    printed = "".join(capfd.readouterr())
    assert "warning: no checkpoint of step 4: " in printed and "Read-only file system" in printed
    assert checkpoints(broken).verify(2) and checkpoints(broken).steps() == [2]
    _mount(small_disk, "rw")
    two_ranks.run(on_ranks.stage, config=broken, name="learn")
    assert_same_end(broken, whole)


@pytest.mark.slow
def test_a_slow_rank(whole: RunConfig, broken: RunConfig) -> None:
    """Nothing is published before its file is written; training does not wait for it."""
    run(broken, rank=1, point="slow_disk", step=2, seconds=2)
    assert checkpoints(broken).steps() == [2, 4, 6]
    assert all(checkpoints(broken).verify(step) for step in (2, 4, 6))
    assert_same_end(broken, whole)
