"""A short soak test; `python -m tests.faults.soak` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_soak(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "4", "--steps", "16", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kills"] == 4 and found["damaged_checkpoints"] == 0
