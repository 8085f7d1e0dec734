"""The real command, and a config for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from lbr_dist.config import to_dict
from tests.configs import tiny_run


def lbr(*arguments: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or (sys.executable, "-m")), "lbr_dist.launch.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )


def config_file(folder: Path, model: Path, data: Path) -> Path:
    path = folder / "config with spaces.yaml"
    path.write_text(yaml.safe_dump(to_dict(tiny_run(folder / "a run", model, data))))
    return path
