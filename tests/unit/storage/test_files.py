"""Private folders, who else can write, and writing a file in one go."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lbr_dist.storage.files import make_private, others_who_write, write_atomic


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
