"""`lbr checkpoints`: what it verifies, exports and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.checkpoint.cases import checkpoints, command, cut, flip, publish, run_with_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with_checkpoints(tmp_path)


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


def test_verify_reads_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 20, stage="represent")
    assert command(run, "verify") == 0
    assert capsys.readouterr().out.count(": ok, 200 bytes in ") == 5
    flip(checkpoints(run).folder(10))
    cut(checkpoints(run).folder(30) / "rank-00000.safetensors")
    assert command(run, "verify") == 1
    said = capsys.readouterr()
    assert "error: 2 of 5 checkpoints read are damaged: learn step-000010, learn step-000030." in said.err
    assert said.out.count(": ok, ") == 3 and "rank-00001.safetensors: its checksum is" in said.out


def test_verify_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 20, stage="represent")
    flip(checkpoints(run).folder(10))
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
    assert command(run, "--stage", "represent", "verify") == 0  # given before the action
    assert "learn" not in capsys.readouterr().out


@pytest.mark.parametrize("step", ["50", "0", "-1", "newest", "010", "10.5", ""])
def test_a_step_that_does_not_exist(run: Path, step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        ("full", ["--stage=learn"], "full', a folder with files in it. Name an empty folder, or a new one"),
        ("file", ["--stage=learn"], "file', a file. Name"),
        ("new", [], "--stage: not given, and both stages have 40. Add"),
    ):
        assert command(run, "export", "--step=40", f"--out={tmp_path / out}", *options) == 1
        assert expected in capsys.readouterr().err
    assert (tmp_path / "full" / "a").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert command(run, "--json", "verify") == 1
    assert "--json: found with verify" in capsys.readouterr().err
