"""Manifests and retention: what needs no ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbr_dist.checkpoint import shards
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest, superfluous
from lbr_dist.config import CheckpointConfig
from lbr_dist.errors import CheckpointError


def manifest(step: int, score: float | None = None, **more: object) -> Manifest:
    blank = Manifest("learn", step, 1, "2026-01-01T00:00:00+00:00", {}, {}, {}, {}, {"step": step}, {}, score, {})
    return dataclasses.replace(blank, **more)  # type: ignore[arg-type]


def publish(folder: Path, step: int, score: float | None = None) -> Checkpoints:
    found = Checkpoints(folder)
    found.begin(step)
    written = shards.write(found.saving(step) / "rank-00000.safetensors", {"master/w": torch.ones(9)}, {})
    entry = {"bytes": written.num_bytes, "xxh3_128": written.xxh3_128}
    found.publish(manifest(step, score, files={written.name: entry}))
    return found


def test_text_and_back() -> None:
    found = manifest(7, 0.1 + 0.2, state={"norms": [1e-17, 3.3]}, values={"loss": float("nan"), "x": float("inf")})
    again = Manifest.parse(found.to_text(), Path("here"))
    assert again == dataclasses.replace(found, values={"loss": None, "x": None})


@given(st.data())
def test_any_changed_byte_is_seen(data: st.DataObject) -> None:
    text = manifest(7, 0.5, state={"norms": [1.5, 2.5]}).to_text().rstrip().encode()
    place = data.draw(st.integers(0, len(text) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(text)
    changed[place] ^= 1 << bit
    try:
        found = Manifest.parse(changed.decode(errors="replace"), Path("here"))
    except CheckpointError:
        return
    # white space between two values, of which JSON knows several
    assert found == Manifest.parse(text.decode(), Path("here"))


def test_a_newer_format_is_named() -> None:
    text = manifest(1).to_text().replace('"format": 1', '"format": 2')
    with pytest.raises(CheckpointError, match=r"found format 2, expected 1\."):
        Manifest.parse(text, Path("here"))


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"keep": 2}, [1, 2, 3, 4]),
        ({"keep": 1, "keep_every": 2}, [1, 3, 5]),
        ({"keep": 1, "keep_best": 1}, [1, 3, 4, 5]),
        ({"keep": 2, "keep_best": 2, "keep_every": 4}, [1]),
        ({"keep": 9}, []),
    ],
)
def test_retention(settings: dict[str, int], gone: list[int]) -> None:
    scores = {1: None, 2: 0.1, 3: 0.2, 4: 0.3, 5: None, 6: 0.4}
    complete = [manifest(step, score) for step, score in scores.items()]
    assert superfluous(complete, CheckpointConfig(**settings)) == gone  # type: ignore[arg-type]


@given(st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=12), st.data())
def test_the_newest_always_stays(scores: list[float | None], data: st.DataObject) -> None:
    settings = CheckpointConfig(
        keep=data.draw(st.integers(1, 5)),
        keep_every=data.draw(st.one_of(st.none(), st.integers(1, 5))),
        keep_best=data.draw(st.integers(0, 5)),
    )
    gone = superfluous([manifest(step + 1, score) for step, score in enumerate(scores)], settings)
    assert len(scores) not in gone


def test_damaged_ones_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    """With keep 1 and a damaged newest one, the only good one stays."""
    for step in (1, 2, 3):
        found = publish(tmp_path / "c", step)
    (found.folder(3) / "rank-00000.safetensors").write_bytes(b"")
    assert found.retain(CheckpointConfig(keep=1)) == [1]
    assert found.steps() == [2, 3]


def test_published_again(tmp_path: Path) -> None:
    found = publish(tmp_path / "c", 2)
    publish(tmp_path / "c", 2)
    assert found.verify(2) and found.pointer() == 2
    assert (found.path / "set-aside" / "step-000002-1" / "manifest.json").exists()


def test_what_a_killed_job_left_is_no_checkpoint(tmp_path: Path) -> None:
    found = publish(tmp_path / "c", 2)
    found.begin(4)
    (found.path / ".deleting-step-000001").mkdir()
    (found.path / "step-3").mkdir()  # not a name of ours
    assert found.steps() == [2]
    assert found.clean() == [".deleting-step-000001", ".saving-step-000004"]
    assert sorted(path.name for path in found.path.iterdir()) == ["latest.json", "step-000002", "step-3"]


def test_the_pointer_is_for_people(tmp_path: Path) -> None:
    found = publish(tmp_path / "c", 2)
    assert json.loads((found.path / "latest.json").read_text()) == {"step": 2, "tag": "step-000002", "world_size": 1}
    (found.path / "latest.json").write_text("{")
    assert found.pointer() is None and found.steps() == [2]
