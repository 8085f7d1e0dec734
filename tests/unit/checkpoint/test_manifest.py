"""Manifests, retention and who may write: what needs no ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lbr_dist import preflight
from lbr_dist.checkpoint import shards
from lbr_dist.checkpoint.manifest import Checkpoints, Manifest, superfluous
from lbr_dist.config import CheckpointConfig, RunConfig, to_dict
from lbr_dist.config.changes import forbidden_changes
from lbr_dist.errors import CheckpointError, ConfigError, LaunchError
from lbr_dist.storage.files import checksum, make_private, others_who_write, write_atomic
from tests.configs import tiny_run


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
    with pytest.raises(CheckpointError, match=r"of format 2, this version of lbr-dist reads 1"):
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


def test_a_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = {"master/a": torch.arange(7.0), "random/torch": torch.arange(5, dtype=torch.uint8)}
    written = shards.write(tmp_path / "x.safetensors", tensors, {"note": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert written.num_bytes == (tmp_path / "x.safetensors").stat().st_size == shards.file_bytes(tensors, {"note": "é"})
    assert written.xxh3_128 == checksum(tmp_path / "x.safetensors")


def test_a_new_folder_is_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert not (tmp_path / "a" / "b").stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert others_who_write(tmp_path / "a" / "b", trust_group=False) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_owner(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.chown(path, 12345, -1)
    assert others_who_write(path, trust_group=True) == "its owner, user 12345"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def run(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path / "run", tmp_path / "base", tmp_path)


def test_what_may_change(tmp_path: Path) -> None:
    config = run(tmp_path)
    changed = dataclasses.replace(
        config,
        run_dir="moved",
        seed=3,
        checkpoint=CheckpointConfig(every_steps=7),
        engine=dataclasses.replace(config.engine, live_elements=1),
        learn=dataclasses.replace(config.learn, row_tokens=999, steps=5),
    )
    assert forbidden_changes(to_dict(config), to_dict(changed)) == ["learn.steps", "seed"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("every_steps", 0), ("every_minutes", 0), ("keep", 0), ("keep_every", 0), ("keep_best", -1), ("resume", 0)],
)
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field}: found {value}, expected"):
        CheckpointConfig(**{field: value})  # type: ignore[arg-type]


def test_no_room_is_said_before_a_rank_starts(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path / "run", tiny_model, tiny_data)
    elements = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    said: list[str] = []
    for room, words in ((12 * elements - 1, None), (12 * elements, 1), (12 * elements * 7, 0)):
        monkeypatch.setattr(preflight, "free_bytes", lambda _, room=room: room)
        if words is None:
            with pytest.raises(LaunchError, match=r"GiB free; a checkpoint takes .* Make room"):
                preflight.check_disk(config, ("learn", "represent"), said.append)
            continue
        preflight.check_disk(config, ("learn", "represent"), said.append)
        assert len(said) == words
        said.clear()


def test_the_pointer_is_for_people(tmp_path: Path) -> None:
    found = publish(tmp_path / "c", 2)
    assert json.loads((found.path / "latest.json").read_text()) == {"step": 2, "tag": "step-000002", "world_size": 1}
    (found.path / "latest.json").write_text("{")
    assert found.pointer() is None and found.steps() == [2]
