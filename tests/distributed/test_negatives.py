"""Mining on real ranks: the same bytes on any number of ranks, and after a process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.launch import cli
from lbr_dist.mining.candidates import Candidates
from lbr_dist.mining.mine import mine
from lbr_dist.mining.work import SETTINGS, MiningSettings, prepare, read_settings
from lbr_dist.ranks.group import Ranks
from tests.ranks import RankPool

DEADLINE_SECONDS = 60


def mine_on(ranks: Ranks, path: Path) -> Any:
    settings = read_settings(path)
    printed: list[str] = []
    mine(settings, Candidates.read(settings.pairs, settings.documents), ranks, printed.append)
    return printed


def prepared(data: Path, out: Path, model: Path, **changes: Any) -> Path:
    """Prepare a work folder; returns the path of its settings."""
    settings = MiningSettings(
        str(data / "train.jsonl"), str(data / "corpus.jsonl"), str(out), str(model), margin_percent=0.95, unit=7
    )
    settings = replace(settings, **changes)
    prepare(settings, print)
    return settings.work / SETTINGS


@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_the_number_of_ranks_changes_no_byte(
    index: str, two_ranks: RankPool, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    mine_on(Ranks.alone(), prepared(tiny_data, alone, tiny_model, index=index))
    printed = two_ranks.run(mine_on, path=prepared(tiny_data, together, tiny_model, index=index))
    assert alone.read_bytes() == together.read_bytes() and len(alone.read_bytes().splitlines()) == 80
    assert printed[0][-1] == f"written to {together}" and printed[1] == []
    slices = {path.name: path.read_bytes() for path in Path(f"{alone}.work").glob("*.npy")}
    assert len(slices) == 14 + 12
    assert slices == {path.name: path.read_bytes() for path in Path(f"{together}.work").glob("*.npy")}


def test_a_killed_mining_resumes_on_another_number_of_ranks(
    two_ranks: RankPool, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    alone, killed = tmp_path / "one.jsonl", tmp_path / "killed.jsonl"
    mine_on(Ranks.alone(), prepared(tiny_data, alone, tiny_model, unit=1))
    path = prepared(tiny_data, killed, tiny_model, unit=1)
    process = subprocess.Popen([sys.executable, "-m", "lbr_dist.launch.worker", "negatives", str(path)])
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(list(path.parent.glob("*.npy"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    before = {each: each.stat().st_ino for each in path.parent.glob("*.npy")}
    assert 3 <= len(before) < 96 + 80 and not killed.exists()
    two_ranks.run(mine_on, path=path)
    assert killed.read_bytes() == alone.read_bytes()
    assert all(each.stat().st_ino == inode for each, inode in before.items())


def test_the_command_starts_ranks_or_is_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def arguments(name: str) -> list[str]:
        given = ["--pairs", tiny_data / "train.jsonl", "--documents", tiny_data / "corpus.jsonl", "--with", "bm25"]
        return ["data", "negatives", *map(str, given), "--out", str(tmp_path / name)]

    assert cli.main([*arguments("one.jsonl"), "--ranks", "1"]) == 0
    assert cli.main([*arguments("two.jsonl"), "--ranks", "2"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("80 pairs, 8.00 negatives per pair") == 2 and f"written to {tmp_path / 'two.jsonl'}" in printed
    # what torchrun does, with one process
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "lbr_dist.launch.cli", *arguments("rank.jsonl")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    contents = {(tmp_path / name).read_bytes() for name in ("one.jsonl", "two.jsonl", "rank.jsonl")}
    assert len(contents) == 1 and not list(tmp_path.glob("*.work"))
