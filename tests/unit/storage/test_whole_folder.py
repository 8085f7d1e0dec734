"""Folders that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.storage import whole_folder


def test_what_is_discarded_takes_no_more_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is removed, another rank writes one: it would keep the folder from going."""
    building = tmp_path / ".key.building"
    (building / "done").mkdir(parents=True)
    remove = whole_folder.shutil.rmtree

    def meanwhile(path: Path, ignore_errors: bool) -> None:
        with pytest.raises(FileNotFoundError):
            (building / "done" / "part.json").write_text("{}")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(whole_folder.shutil, "rmtree", meanwhile)
    whole_folder.discard(building)
    assert not list(tmp_path.iterdir())
    whole_folder.discard(building)  # another rank was first
