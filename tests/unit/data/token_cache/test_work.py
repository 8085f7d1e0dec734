"""Interrupted builds: what the next build keeps, and what it removes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache import part as token_parts
from lbr_dist.storage import whole_folder
from tests.unit.data.token_cache.cases import expected, left_in, made


def test_a_killed_build_is_never_used_and_is_cleared_away(
    corpus: Path, tokenizer: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    job = start(corpus, tmp_path / "cache", 1, "killed")
    job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL
    (building,) = (tmp_path / "cache").glob(".*.building")
    assert (building / "part-00002.tokens").stat().st_size
    mine = whole_folder.building_folder(tmp_path / "cache" / ("0" * 32))
    elsewhere = tmp_path / "cache" / ".00000000000000000000000000000000.other-1.4999999.00000000.building"
    for folder in (mine, elsewhere):
        folder.mkdir()  # of this process, and of a process on another host
    cache = made(corpus, tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert left_in(tmp_path / "cache") == sorted([elsewhere.name, mine.name, cache.folder.name])


@pytest.mark.usefixtures("small_units")
def test_an_interrupted_build_is_resumed(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(corpus, tokenizer, tmp_path / "whole").folder
    cache, real = tmp_path / "cache", token_parts.write_part
    building = cut_off(corpus, tokenizer, cache, monkeypatch, 5)
    kept = {number: (building / f"part-{number:05d}.tokens").stat().st_ino for number in (0, 4)}
    (building / "part-00001.lengths").write_bytes(b"")  # as after a power failure
    (building / "done" / "00002.json").write_text("{")
    (building / ".part-00005.tokens.abcd").write_bytes(b"cut off")
    written: list[int] = []
    monkeypatch.setattr(
        build_tokens, "write_part", lambda unit, *more: written.append(unit.number) or real(unit, *more)
    )
    said: list[str] = []
    found = made(corpus, tokenizer, cache, say=said.append).folder
    count = len(list(whole.glob("*.tokens")))
    assert written == [1, 2, *range(5, count)] and "already done by an earlier build" in said[0]
    assert all((found / f"part-{number:05d}.tokens").stat().st_ino == inode for number, inode in kept.items())
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, found)]
    assert contents[0] == contents[1]
    assert left_in(cache) == [found.name]


@pytest.mark.usefixtures("small_units")
def test_parts_of_another_plan_are_made_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A different part size, another name for the corpus (it is in messages), or a file written to since."""

    def cut() -> None:
        monkeypatch.setattr(build_tokens, "_UNIT", 5000)
        monkeypatch.setattr(build_tokens, "write_part", token_parts.write_part)
        cut_off(corpus, tokenizer, tmp_path / "cache", monkeypatch, 5)

    def made_again() -> bool:
        said: list[str] = []
        cache = made(corpus, tokenizer, tmp_path / "cache", say=said.append)
        assert list(cache) == expected(tokenizer)
        cache.verify()
        for path in cache.folder.iterdir():
            path.unlink()
        cache.folder.rmdir()
        return "already done by an earlier build" not in said[0]

    cut()
    assert not made_again()
    cut()
    monkeypatch.setattr(build_tokens, "_UNIT", 6000)
    assert made_again()
    cut()
    os.utime(corpus)
    assert made_again()
    cut()
    corpus = corpus.rename(corpus.with_name("renamed.jsonl"))
    assert made_again()


@pytest.mark.usefixtures("small_units")
def test_a_folder_that_another_host_seems_to_write_is_left_alone(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some file systems, other hosts do not see a lock."""
    building = cut_off(corpus, tokenizer, tmp_path / "cache", monkeypatch, 5)
    (building / "done" / "host").write_text("elsewhere-1")
    before = sorted(path.name for path in building.iterdir())
    cache = made(corpus, tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert sorted(path.name for path in building.iterdir()) == before
    shutil.rmtree(cache.folder)
    for path in (building, *building.iterdir()):
        os.utime(path, (time.time() - 100,) * 2)
    said: list[str] = []
    made(corpus, tokenizer, tmp_path / "cache", say=said.append)
    assert "already done by an earlier build" in said[0] and not building.exists()


def cut_off(corpus: Path, tokenizer: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> Path:
    """Build until some parts are finished. Returns the folder with these parts."""
    real = token_parts.write_part

    def write_part(unit: token_parts.Unit, *arguments: Any) -> Any:
        if unit.number == parts:
            raise KeyboardInterrupt
        return real(unit, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build_tokens, "write_part", write_part)
        with pytest.raises(KeyboardInterrupt):
            made(corpus, tokenizer, cache)
    (building,) = cache.glob(".*.building")
    return building
