"""Folders that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.storage import whole_folder


def test_no_part_can_be_written_to_a_discarded_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank writes a part during the removal: this would keep the folder from being removed."""
    building = tmp_path / ".key.building"
    (building / "done").mkdir(parents=True)
    remove = whole_folder.shutil.rmtree

    def write_and_remove(path: Path, ignore_errors: bool) -> None:
        with pytest.raises(FileNotFoundError):
            (building / "done" / "part.json").write_text("{}")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(whole_folder.shutil, "rmtree", write_and_remove)
    whole_folder.discard(building)
    assert not list(tmp_path.iterdir())
    whole_folder.discard(building)  # another rank was first
