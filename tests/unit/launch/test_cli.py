"""What the command prints for the config and for a mistake, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lbr_dist.config import RunConfig, file
from lbr_dist.launch import cli
from tests.unit.launch.cases import message


def test_config_command_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    printed = capsys.readouterr().out
    for key in file._known_keys(RunConfig):
        assert key.split(".")[-1] in printed
    assert "--represent.temperature  (float, default 0.05)" in printed


def test_a_path_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: /proc/nowhere: No such file or directory" in message(
        capsys, "data", "medical", "--out", "/proc/nowhere"
    )


def test_represent_needs_learn(run: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Run `lbr learn` first" in message(capsys, "represent", str(run[0]))


def test_help_and_config_errors_import_no_torch(run: tuple[Path, RunConfig]) -> None:
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "try: code = cli.main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (["--help"], ["run", str(run[0]), "--learn.stepz=3"], ["run", str(run[0]), "--ranks=1000"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
