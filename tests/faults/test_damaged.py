"""Checkpoints that are not what was written: named, set aside, never deleted; the newest whole one is taken."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lbr_dist.checkpoint.manifest import MANIFEST, SET_ASIDE, Checkpoints, tag
from lbr_dist.config import RunConfig
from tests.distributed import on_ranks
from tests.faults.runs import assert_same_end, checkpoints, run
from tests.ranks import RankPool

SHARD = "rank-00001.safetensors"


@pytest.fixture
def stopped(whole: RunConfig, broken: RunConfig) -> RunConfig:
    """The run as it was after step 4, with checkpoints of the steps 2 and 4."""
    shutil.copytree(whole.stage_path("learn"), broken.stage_path("learn"))
    shutil.rmtree(checkpoints(broken).folder(6))
    for name in ("export", "summary.json"):
        path = broken.stage_path("learn") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return broken


def resume(pool: RankPool, config: RunConfig, **settings: object) -> None:
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **settings))
    pool.run(on_ranks.stage, config=config, name="learn")


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def _truncate(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.truncate((folder / SHARD).stat().st_size // 2)


def _swap_steps(folder: Path) -> None:
    shutil.copyfile(folder.parent / tag(2) / SHARD, folder / SHARD)


def _swap_ranks(folder: Path) -> None:
    first, second = folder / "rank-00000.safetensors", folder / SHARD
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def _manifest_of_another(folder: Path) -> None:
    shutil.copyfile(folder.parent / tag(2) / MANIFEST, folder / MANIFEST)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, SHARD),
    "bit flipped": (lambda folder: _flip(folder / SHARD, -1000), f"{SHARD}: its checksum is"),
    "header flipped": (lambda folder: _flip(folder / SHARD, 30), f"{SHARD}: its checksum is"),
    "deleted": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: missing"),
    "of another step": (_swap_steps, SHARD),
    "ranks swapped": (_swap_ranks, "rank-0000"),
    "manifest flipped": (lambda folder: _flip(folder / MANIFEST, 200), "damaged"),
    "manifest cut": (lambda folder: (folder / MANIFEST).write_text("{"), "damaged"),
    "manifest of another step": (_manifest_of_another, "found step 2, expected 4"),
    "empty": (_empty, f"has no {MANIFEST}"),
    "half written": (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig, name: str) -> None:
    damage, named = DAMAGE[name]
    folder = checkpoints(stopped).folder(4)
    damage(folder)
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume(two_ranks, stopped)
    aside = checkpoints(stopped).path / SET_ASIDE / "step-000004-1"
    reason = json.loads((aside / "reason.json").read_text())["why"]
    assert named in reason
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.name != "reason.json"} == left
    assert_same_end(stopped, whole)


def test_none_is_whole(two_ranks: RankPool, stopped: RunConfig) -> None:
    """Nothing begins anew unasked; nothing is deleted."""
    for step in (2, 4):
        _truncate(checkpoints(stopped).folder(step))
    with pytest.raises(AssertionError, match="all of its checkpoints are damaged"):
        resume(two_ranks, stopped)
    aside = checkpoints(stopped).path / SET_ASIDE
    assert sorted(path.name for path in aside.iterdir()) == ["step-000002-1", "step-000004-1"]


def test_an_older_step(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig) -> None:
    """What is newer is set aside, so that no later start takes it for this run's."""
    resume(two_ranks, stopped, resume=2)
    reason = json.loads((checkpoints(stopped).path / SET_ASIDE / "step-000004-1" / "reason.json").read_text())
    assert reason["why"] == "left behind by checkpoint.resume 2"
    assert checkpoints(stopped).steps() == [2, 4, 6]
    assert_same_end(stopped, whole)


def test_a_damaged_one_that_was_asked_for(two_ranks: RankPool, stopped: RunConfig) -> None:
    _truncate(checkpoints(stopped).folder(4))
    with pytest.raises(AssertionError, match=r"found [\d,]+ bytes, expected .* also has step-000002\."):
        resume(two_ranks, stopped, resume=4)
    assert checkpoints(stopped).steps() == [2, 4]


def test_a_step_that_is_not_there(two_ranks: RankPool, stopped: RunConfig) -> None:
    with pytest.raises(AssertionError, match=r"found 3, but .* has step-000002, step-000004"):
        resume(two_ranks, stopped, resume=3)


def test_required(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig, broken: RunConfig) -> None:
    resume(two_ranks, stopped, resume="required")
    assert_same_end(stopped, whole)
    shutil.rmtree(broken.stage_path("learn"))
    with pytest.raises(AssertionError, match=r"found 'required', but .* has no checkpoint"):
        resume(two_ranks, broken, resume="required")


def test_never(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig) -> None:
    resume(two_ranks, stopped, resume="never")
    aside = checkpoints(stopped).path / SET_ASIDE
    assert sorted(path.name for path in aside.iterdir()) == ["step-000002-1", "step-000004-1"]
    assert_same_end(stopped, whole)


def test_a_clock_that_jumped_back(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig) -> None:
    """Steps decide what is newest, not times."""
    found: Checkpoints = checkpoints(stopped)
    for step, saved_at in ((2, "2100-01-01T00:00:00+00:00"), (4, "1970-01-01T00:00:00+00:00")):
        manifest = dataclasses.replace(found.read(step), saved_at=saved_at)
        (found.folder(step) / MANIFEST).write_text(manifest.to_text())
    resume(two_ranks, stopped)
    assert not (found.path / SET_ASIDE).exists()
    assert_same_end(stopped, whole)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_read(two_ranks: RankPool, whole: RunConfig, stopped: RunConfig, tmp_path: Path) -> None:
    """Not one that lies in the folder, and not one in the place of a shard."""
    folder, touched = checkpoints(stopped).folder(4), tmp_path / "touched"
    content = pickle.dumps(_Payload(touched))
    for name in ("mp_rank_00_model_states.pt", "rank-00000.pt", "latest"):
        (folder / name).write_bytes(content)
    (folder / SHARD).write_bytes(content.ljust((folder / SHARD).stat().st_size, b"\0"))
    resume(two_ranks, stopped)
    assert not touched.exists()
    assert (checkpoints(stopped).path / SET_ASIDE / "step-000004-1").is_dir()
    assert_same_end(stopped, whole)
    pickle.loads(content)
    assert touched.exists(), "the payload would have shown"


@pytest.mark.parametrize(
    "place", [".", "learn/checkpoints", "learn/checkpoints/step-000004", f"learn/checkpoints/step-000002/{SHARD}"]
)
@pytest.mark.parametrize("mode", [0o002, 0o020], ids=["all", "group"])
def test_others_can_write(two_ranks: RankPool, stopped: RunConfig, place: str, mode: int) -> None:
    path = stopped.run_path / place
    path.chmod(path.stat().st_mode | mode)
    who = "every user" if mode == 0o002 else "every member of the group"
    if mode == 0o020:
        shutil.chown(path, group="users")
    with pytest.raises(AssertionError, match=f"{path.resolve()}: can be changed by {who}.*chmod -R go-w"):
        resume(two_ranks, stopped)
    if mode == 0o020:
        resume(two_ranks, stopped, trust_group=True)
    else:
        with pytest.raises(AssertionError, match="can be changed"):
            resume(two_ranks, stopped, trust_group=True)


@pytest.mark.slow
def test_a_run_under_any_umask_goes_on(two_ranks: RankPool, whole: RunConfig, broken: RunConfig) -> None:
    """What a run itself makes, others cannot write."""
    before = os.umask(0)
    try:
        run(broken)
    finally:
        os.umask(before)
    checkpoints(broken).remove(6)
    resume(two_ranks, broken)
    assert_same_end(broken, whole)
