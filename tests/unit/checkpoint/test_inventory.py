"""What `lbr checkpoints` reports for every state that a run folder can be in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lbr_dist.checkpoint import inventory
from lbr_dist.checkpoint.inventory import CheckpointRow
from lbr_dist.checkpoint.manifest import Checkpoints
from lbr_dist.config import STAGES, StageName
from tests.unit.checkpoint.cases import checkpoints, command, cut, publish, run_with_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with_checkpoints(tmp_path)


def rows(run: Path, stage: StageName = "learn") -> dict[str, CheckpointRow]:
    return {row.path.name: row for row in inventory.inventory(run, [stage])}


def test_complete(run: Path) -> None:
    found = rows(run)
    assert list(found) == ["step-000010", "step-000020", "step-000030", "step-000040"]
    assert {row.state for row in found.values()} == {"complete"}
    assert [name for name, row in found.items() if row.latest] == ["step-000040"]
    assert [name for name, row in found.items() if row.best] == ["step-000030"]


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
        "rank-00001.safetensors: missing, but manifest.json lists it",
    ),
    "truncated shard": (
        lambda f: cut(f / "rank-00000.safetensors"),
        "rank-00000.safetensors: found 99 bytes, expected 100",
    ),
    "another step's": (
        lambda f: shutil.copy(f.with_name("step-000010") / "manifest.json", f),
        "manifest.json: found step 10, expected 30 as in the folder's name",
    ),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "has no manifest.json, so it was never completed"),
}


def _cut_half(path: Path) -> None:
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damage is reported, the checkpoint is no longer the best one, and the others are unaffected."""
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
    (there.path / "set-aside" / "step-000020-2").mkdir()  # empty, without a reason
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
    sizes = [row.num_bytes for row in inventory.inventory(run, STAGES)]
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
        ("2020-01-01T00:00:00", "-"),  # without a time zone
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


def test_a_pointer_without_a_checkpoint_is_ignored(run: Path) -> None:
    pointer = checkpoints(run).path / "latest.json"
    for text in ("{", '{"step": 999}', None):
        pointer.unlink() if text is None else pointer.write_text(text)
        assert [name for name, row in rows(run).items() if row.latest] == ["step-000040"]
    pointer.write_text('{"step": 20}')
    assert [name for name, row in rows(run).items() if row.latest] == ["step-000020"]


def test_a_checkpoint_deleted_while_listing_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [5, 10])
    assert list(rows(run)) == ["step-000010"]


def test_sizes_and_ages_are_readable() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 * 2**30: "5.0 GiB", 3 * 2**40: "3.0 TiB", 2**52: "4096.0 TiB"}
    assert {count: inventory.size_text(count) for count in sizes} == sizes
    ages = {0.4: "0 s", 119.0: "119 s", 120.0: "2 min", 7199.0: "120 min", 7200.0: "2 h", 172_800.0: "2 d"}
    assert {age: inventory._age_text(age) for age in ages} == ages
