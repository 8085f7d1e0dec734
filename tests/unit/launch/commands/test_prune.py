"""What `lbr checkpoints RUN prune` deletes, and when it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.config import CheckpointConfig, to_dict
from lbr_dist.config.file import write_config
from tests.configs import tiny_run
from tests.unit.checkpoint.cases import checkpoints, command, cut, flip, publish, run_with_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with_checkpoints(tmp_path)


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    freed = sum(path.stat().st_size for path in checkpoints(run).folder(10).iterdir())
    assert command(run, "prune", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "learn step-000010: would be deleted" in said and said.count("deleted") == 1
    assert f"would free {freed:,} bytes" in said
    assert checkpoints(run).steps() == [10, 20, 30, 40] and not (run / ".lock").exists()
    assert command(run, "prune") == 0  # the config keeps three
    said = capsys.readouterr().out
    assert "learn step-000040: ok" in said and "learn step-000010: deleted" in said and f"freed {freed:,} bytes" in said
    assert checkpoints(run).steps() == [20, 30, 40]
    assert [path.name for path in checkpoints(run).path.iterdir() if path.name.startswith(".")] == []
    assert command(run, "prune") == 0
    assert capsys.readouterr().out == f"{run}: nothing to delete\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--keep=1"], [40]),
        (["--keep=9"], [10, 20, 30, 40]),
        (["--keep=1", "--keep-every=20"], [20, 40]),
        (["--keep=1", "--keep-best=1"], [30, 40]),
        (["--keep=1", "--stage=represent"], [10, 20, 30, 40]),
    ],
)
def test_prune_by_another_rule(run: Path, options: list[str], expected: list[int]) -> None:
    publish(run, 7, stage="represent")
    assert command(run, "prune", *options) == 0
    assert checkpoints(run).steps() == expected and checkpoints(run, "represent").steps() == [7]


def test_prune_never_deletes_the_only_good_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoints(run).folder(40))
    for options in ([], ["--dry-run"], ["--keep=2", "--keep-best=1"]):
        assert command(run, "prune", *options) == 1
        said = capsys.readouterr()
        assert "rank-00001.safetensors: its checksum is" in said.err and "deleted" not in said.out
        assert "It is the newest of learn that would be kept, so nothing is deleted." in said.err
    assert checkpoints(run).steps() == [10, 20, 30, 40]
    # without its files, it is no checkpoint to the rule: neither kept nor deleted
    cut(checkpoints(run).folder(40) / "rank-00000.safetensors")
    assert command(run, "prune", "--keep=1") == 0
    assert checkpoints(run).steps() == [30, 40]


def test_prune_looks_at_both_stages_before_it_deletes(run: Path) -> None:
    for step in (1, 2):
        publish(run, step, stage="represent")
    flip(checkpoints(run, "represent").folder(2))
    assert command(run, "prune", "--keep=1") == 1
    assert checkpoints(run).steps() == [10, 20, 30, 40] and checkpoints(run, "represent").steps() == [1, 2]


def test_prune_what_was_set_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = checkpoints(run)
    aside = there.set_aside(10, "damaged")
    stranger = aside.with_name("notes")
    stranger.mkdir()
    assert command(run, "prune", "--keep=9") == 0 and aside.is_dir()
    assert command(run, "prune", "--keep=9", "--set-aside", "--dry-run") == 0 and aside.is_dir()
    capsys.readouterr()
    assert command(run, "prune", "--keep=9", "--set-aside") == 0
    assert "learn set-aside/step-000010-1: deleted" in capsys.readouterr().out
    assert not aside.exists() and stranger.is_dir() and there.steps() == [20, 30, 40]
    # refused if nothing else is left
    places = [there.set_aside(step, "checkpoint.resume never") for step in there.steps()]
    assert command(run, "prune", "--set-aside") == 1
    assert "what was set aside may be all that is left of learn" in capsys.readouterr().err
    assert all(place.is_dir() for place in places)


def test_prune_needs_a_rule(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (
        ("--keep=0", "checkpoint.keep: found 0"),
        ("--keep-every=0", "checkpoint.keep_every: found 0"),
        ("--keep-best=-1", "checkpoint.keep_best: found -1"),
    ):
        assert command(run, "prune", option) == 1
        assert expected in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert command(run, "prune") == 1
    assert (
        "config.yaml: does not exist, so it is not known how many checkpoints to keep. Give --keep."
        in capsys.readouterr().err
    )
    assert checkpoints(run).steps() == [10, 20, 30, 40]
    assert command(run, "prune", "--keep=2") == 0
    assert checkpoints(run).steps() == [30, 40]


def test_prune_takes_the_runs_own_rule(run: Path, tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=1, keep_every=20, keep_best=1)
    config = tiny_run(run, tmp_path / "base", tmp_path, checkpoint=settings)
    assert to_dict(config)["checkpoint"]["keep_every"] == 20
    write_config(config, run / "config.yaml")
    assert command(run, "prune") == 0
    assert checkpoints(run).steps() == [20, 30, 40]
