"""What `lbr checkpoints` says of every state that a run's folder can be in, and what it deletes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from lbr_dist.checkpoint import inventory, shards
from lbr_dist.checkpoint.inventory import Row
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest
from lbr_dist.checkpoint.saver import _runs
from lbr_dist.config import CheckpointConfig, Stage, to_dict
from lbr_dist.config.file import write_config
from lbr_dist.launch import cli
from lbr_dist.storage.files import checksum
from tests.configs import tiny_run


def checkpoints(run: Path, stage: Stage = "learn") -> Checkpoints:
    return Checkpoints(run / stage / "checkpoints")


def publish(run: Path, step: int, score: float | None = None, age: float = 0.0, stage: Stage = "learn") -> Path:
    """A checkpoint of two ranks with 100 bytes each."""
    there = checkpoints(run, stage)
    there.begin(step)
    files = {}
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = there.saving(step) / name
        path.write_bytes(bytes([step % 256]) * 100)
        files[name] = {"bytes": 100, "xxh3_128": checksum(path)}
    saved_at = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
    values = {"loss": 1.0 + step}
    there.publish(Manifest(stage, step, 2, saved_at, {}, {}, {}, {}, {"step": step}, values, score, files))
    return there.folder(step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four checkpoints of stage 1, the third of them the best, and its config: keep 3."""
    config = tiny_run(tmp_path / "run", tmp_path / "base", tmp_path)
    write_config(config, config.run_path / "config.yaml")
    for step, score in ((10, 3.0), (20, 2.0), (30, 1.0), (40, 1.5)):
        publish(config.run_path, step, score)
    return config.run_path


def command(*arguments: str | Path) -> int:
    return cli.main(["checkpoints", *map(str, arguments)])


def rows(run: Path, stage: Stage = "learn") -> dict[str, Row]:
    return {row.path.name: row for row in inventory.inventory(run, [stage])}


# ---- list ----------------------------------------------------------------------------------------------------------


def test_complete(run: Path) -> None:
    found = rows(run)
    assert list(found) == ["step-000010", "step-000020", "step-000030", "step-000040"]
    assert {row.state for row in found.values()} == {"complete"}
    assert [name for name, row in found.items() if row.latest] == ["step-000040"]
    assert [name for name, row in found.items() if row.best] == ["step-000030"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"world_size": 2', '"world_size": 3'))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest that was edited": (
        lambda f: _edit(f / "manifest.json"),
        "manifest.json: damaged (ValueError('its checksum differs'))",
    ),
    "manifest that ends early": (lambda f: _cut_half(f / "manifest.json"), "manifest.json: damaged (JSONDecodeError"),
    "manifest of nothing": (lambda f: (f / "manifest.json").write_bytes(b"\xff[]"), "manifest.json: damaged ("),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json, so it was never completed"),
    "missing shard": (
        lambda f: (f / "rank-00001.safetensors").unlink(),
        "rank-00001.safetensors: missing, though manifest.json names it",
    ),
    "truncated shard": (
        lambda f: _cut(f / "rank-00000.safetensors"),
        "rank-00000.safetensors: found 99 bytes, expected 100",
    ),
    "another step's": (
        lambda f: shutil.copy(f.with_name("step-000010") / "manifest.json", f),
        "manifest.json: is of step 10, the folder of step 30",
    ),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "has no manifest.json, so it was never completed"),
}


def _cut_half(path: Path) -> None:
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, it is no longer the best one, and the others stand as they did."""
    spoil, expected = DAMAGE[name]
    spoil(checkpoints(run).folder(30))
    found = rows(run)
    assert found["step-000030"].state == "damaged"
    assert found["step-000030"].reason is not None and found["step-000030"].reason.startswith(expected)
    assert [row.state for row in found.values()].count("complete") == 3
    assert [name for name, row in found.items() if row.best] == ["step-000040"]
    assert command(run) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.split()[:2] == ["learn", "30"] and f"damaged: {expected}" in line
    assert command(run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][2]["reason"].startswith(expected)


def test_unfinished_and_set_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = checkpoints(run)
    there.begin(50)
    (there.saving(50) / "rank-00000.safetensors").write_bytes(bytes(50))
    there.folder(10).rename(there.path / ".deleting-step-000010")
    aside = there.set_aside(20, "left behind by checkpoint.resume 30")
    (there.path / "set-aside" / "step-000020-2").mkdir()  # of no reason, and with nothing in it
    (there.path / ".saving-step-000060").write_text("no folder")
    (there.path / "set-aside" / "step-000030-1").symlink_to(there.folder(30))
    found = rows(run)
    assert {name: row.state for name, row in found.items()} == {
        "step-000030": "complete",
        "step-000040": "complete",
        ".deleting-step-000010": "being deleted",
        ".saving-step-000050": "being written",
        "step-000020-1": "set aside",
        "step-000020-2": "set aside",
    }
    assert found[".saving-step-000050"].num_bytes == 50 and found[".saving-step-000050"].manifest is None
    assert found[aside.name].reason == "left behind by checkpoint.resume 30" and found["step-000020-2"].reason is None
    assert command(run, "--json") == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out)["checkpoints"]] == [30, 40, 10, 50, 20, 20]


def test_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "learn")
    publish(run, 1000, 2.5, age=3 * 3600 + 60)
    publish(run, 2000, stage="represent", age=605)
    checkpoints(run, "represent").begin(3000)
    sizes = [row.num_bytes for row in inventory.inventory(run, inventory.STAGES)]
    assert sizes[0] == sum(path.stat().st_size for path in checkpoints(run).folder(1000).iterdir()) > 200
    assert command(run) == 0
    said = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in said] == [
        "stage step size age ranks loss held-out state",
        f"learn 1000 {sizes[0]} B 3 h 2 1001.0000 2.5000 complete, latest, best",
        f"represent 2000 {sizes[1]} B 10 min 2 2001.0000 - complete, latest",
        "represent 3000 0 B 0 s - - - being written",
    ]
    words = ("state", "complete", "complete", "being")
    assert len({line.index(word) for line, word in zip(said, words, strict=True)}) == 1
    assert command(run, "--stage", "learn") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("saved_at", "expected"),
    [
        ((datetime.now(UTC) + timedelta(days=400)).isoformat(), "0 s"),
        ("9999-12-31T23:59:59+00:00", "0 s"),
        ("2020-01-01T00:00:00", "-"),  # of no time zone
        ("yesterday", "-"),
    ],
)
def test_age_of_a_wrong_clock(run: Path, saved_at: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    there = checkpoints(run)
    (there.folder(40) / "manifest.json").write_text(replace(there.read(40), saved_at=saved_at).to_text())
    assert rows(run)["step-000040"].state == "complete"
    assert command(run) == 0
    assert f" B {expected} 2 41.0000 " in " ".join(capsys.readouterr().out.splitlines()[4].split())
    assert command(run, "--json") == 0
    seconds = json.loads(capsys.readouterr().out)["checkpoints"][3]["age_seconds"]
    assert seconds == (0 if expected == "0 s" else None)


def test_the_pointer_that_names_nothing(run: Path) -> None:
    pointer = checkpoints(run).path / "latest.json"
    for text in ("{", '{"step": 999}', None):
        pointer.unlink() if text is None else pointer.write_text(text)
        assert [name for name, row in rows(run).items() if row.latest] == ["step-000040"]
    pointer.write_text('{"step": 20}')
    assert [name for name, row in rows(run).items() if row.latest] == ["step-000020"]


def test_one_that_is_deleted_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [5, 10])
    assert list(rows(run)) == ["step-000010"]


def test_no_run_folder(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for folder, found in (
        (tmp_path / "nowhere", "nothing there"),
        (tmp_path / "file", "a file"),
        (run / "learn", "a folder with neither config.yaml nor"),
    ):
        for action in ([], ["verify"], ["prune"], ["export", "--step=1", "--out=x"]):
            assert command(folder, *action) == 1
            said = capsys.readouterr()
            assert said.err.startswith(f"error: {folder}: found {found}") and "expected a run folder" in said.err
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "learn")
    assert command(run) == 0
    assert capsys.readouterr().out == f"{run}: no checkpoints of learn and represent\n"
    assert command(run, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "checkpoints": []}
    assert command(run, "verify") == 1
    assert f"{run} has no checkpoint of learn or represent." in capsys.readouterr().err


def test_for_people() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 * 2**30: "5.0 GiB", 3 * 2**40: "3.0 TiB", 2**52: "4096.0 TiB"}
    assert {count: inventory.size_text(count) for count in sizes} == sizes
    ages = {0.4: "0 s", 119.0: "119 s", 120.0: "2 min", 7199.0: "120 min", 7200.0: "2 h", 172_800.0: "2 d"}
    assert {age: inventory._age_text(age) for age in ages} == ages


# ---- verify --------------------------------------------------------------------------------------------------------


def _flip(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    path.write_bytes(b"x" + path.read_bytes()[1:])


def test_verify_reads_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 20, stage="represent")
    assert command(run, "verify") == 0
    assert capsys.readouterr().out.count(": ok, 200 bytes in ") == 5
    _flip(checkpoints(run).folder(10))
    _cut(checkpoints(run).folder(30) / "rank-00000.safetensors")
    assert command(run, "verify") == 1
    said = capsys.readouterr()
    assert "error: 2 of 5 checkpoints read are damaged: learn step-000010, learn step-000030." in said.err
    assert said.out.count(": ok, ") == 3 and "rank-00001.safetensors: its checksum is" in said.out


def test_verify_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 20, stage="represent")
    _flip(checkpoints(run).folder(10))
    for options, expected in (
        (["--step=20"], ["learn step-000020", "represent step-000020"]),
        (["--step=30"], ["learn step-000030"]),
        (["--step=20", "--stage=represent"], ["represent step-000020"]),
        (["--step=latest"], ["learn step-000040", "represent step-000020"]),
        (["--step=best"], ["learn step-000030"]),
    ):
        assert command(run, "verify", *options) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in said if ": ok" in line] == expected
    assert command(run, "--stage", "represent", "verify") == 0  # said before the action
    assert "learn" not in capsys.readouterr().out


@pytest.mark.parametrize("step", ["50", "0", "-1", "newest", "010", "10.5", ""])
def test_a_step_that_is_not_there(run: Path, step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in (["verify"], ["export", f"--out={tmp_path / 'out'}"]):
        assert command(run, *action, f"--step={step}") == 1
        said = capsys.readouterr().err
        assert f"--step: found {step}, but {run} has learn step-000010, learn step-000020," in said


def test_export_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 40, stage="represent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, options, expected in (
        ("full", ["--stage=learn"], "full', a folder with files in it. Name a folder that is empty or not there"),
        ("file", ["--stage=learn"], "file', a file. Name"),
        ("new", [], "--stage: not given, and both stages have 40. Say"),
    ):
        assert command(run, "export", "--step=40", f"--out={tmp_path / out}", *options) == 1
        assert expected in capsys.readouterr().err
    assert (tmp_path / "full" / "a").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert command(run, "--json", "verify") == 1
    assert "--json: found with verify" in capsys.readouterr().err


# ---- prune ---------------------------------------------------------------------------------------------------------


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
    _flip(checkpoints(run).folder(40))
    for options in ([], ["--dry-run"], ["--keep=2", "--keep-best=1"]):
        assert command(run, "prune", *options) == 1
        said = capsys.readouterr()
        assert "rank-00001.safetensors: its checksum is" in said.err and "deleted" not in said.out
        assert "It is the newest of learn that would stay, so nothing is deleted." in said.err
    assert checkpoints(run).steps() == [10, 20, 30, 40]
    # whose files are not even there is no checkpoint to the rule: neither kept nor deleted
    _cut(checkpoints(run).folder(40) / "rank-00000.safetensors")
    assert command(run, "prune", "--keep=1") == 0
    assert checkpoints(run).steps() == [30, 40]


def test_prune_looks_at_both_stages_before_it_deletes(run: Path) -> None:
    for step in (1, 2):
        publish(run, step, stage="represent")
    _flip(checkpoints(run, "represent").folder(2))
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
    # and not where they are all there is
    places = [there.set_aside(step, "checkpoint.resume never") for step in there.steps()]
    assert command(run, "prune", "--set-aside") == 1
    assert "what was set aside may be all there is of learn" in capsys.readouterr().err
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
        "config.yaml: not there, so how many are to stay is not known. Say it with --keep." in capsys.readouterr().err
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


def test_tensors_that_lie_one_behind_the_other_are_copied_at_once() -> None:
    flat, other = torch.arange(10.0), torch.arange(4.0)
    tensors = {"a": flat[:3], "x": other[:2], "b": flat[3:5], "c": flat[6:8], "y": other[2:], "d": flat[8:]}
    assert sorted(_runs(tensors)) == [["a", "b"], ["c", "d"], ["x", "y"]]


def test_a_file_system_need_not_know_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: int) -> None:
        asked.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    written = shards.write(tmp_path / "file", {"master/a": torch.ones(5 << 20)}, {})
    assert len(asked) == 2 and checksum(tmp_path / "file") == written.xxh3_128
