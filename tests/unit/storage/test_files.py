"""Private folders, other users who can write, and atomic writes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import lbr_dist
from lbr_dist.storage.files import make_private, others_who_write, replacing, write_atomic


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


@pytest.mark.parametrize("kill", [False, True], ids=["an error", "killed"])
def test_a_file_that_is_being_replaced_is_the_old_one_or_the_new_one(tmp_path: Path, kill: bool) -> None:
    path = tmp_path / "index.html"
    write_atomic(path, "the old page")
    with replacing(path) as temporary:
        temporary.write_text("the new page")
        assert path.read_text() == "the old page"
    assert path.read_text() == "the new page"
    how = "os.kill(os.getpid(), 9)" if kill else "raise KeyError"
    code = (
        "import os, sys; from pathlib import Path; from lbr_dist.storage.files import atomic_file\n"
        f"with atomic_file(Path(sys.argv[1])) as file:\n    file.write(b'half'); file.flush(); {how}"
    )
    root = str(Path(lbr_dist.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False, capture_output=True, timeout=60)
    assert path.read_text() == "the new page"
    assert len(list(tmp_path.iterdir())) == (2 if kill else 1)


def test_a_fixed_temporary_name_is_written_over(tmp_path: Path) -> None:
    path, temporary = tmp_path / "vectors.npy", tmp_path / ".vectors.npy.unfinished"
    temporary.write_text("what a killed process left")
    with replacing(path, temporary) as given:
        given.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
