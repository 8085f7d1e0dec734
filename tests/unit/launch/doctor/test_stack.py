"""The check of torch and its GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lbr_dist.launch.doctor import stack as doctor_stack
from tests.unit.launch.doctor.cases import environment, states, two_gpus


def test_gpus_that_torch_cannot_use(tmp_path: Path) -> None:
    command = [*two_gpus(tmp_path / "dev"), sys.executable, "-m", "lbr_dist.launch.doctor.stack"]
    printed = subprocess.check_output(command, env=environment(CUDA_VISIBLE_DEVICES=None), text=True)
    found = states([json.loads(line) for line in printed.splitlines()])
    # the first if torch is built without CUDA, else the second: names in /dev are not GPUs
    assert "fault" in (found["torch"], found.get("devices"))


def test_gpus_as_torch_reports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three fake GPUs, one is busy and old; a fourth is missing."""
    about = [SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)] * 2
    about.append(SimpleNamespace(name="V100", total_memory=32 << 30, major=7, minor=0))
    made_up = {
        "init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": about.__getitem__,
        "mem_get_info": lambda device: ((8 if device == 2 else 31) << 30, 32 << 30),
    }
    for name, function in made_up.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_stack, "count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    mismatch, busy, old, devices = doctor_stack._gpus()
    assert mismatch.state == "fault" and mismatch.found == "4 in /dev, torch sees 3"
    assert busy.name == "GPU 2" and busy.state == "warning" and busy.found == "8.0 GiB of 32.0 GiB free"
    assert old.name == "GPU 2" and old.state == "warning" and "capability 7.0" in old.found
    assert devices.found.startswith("2 x H100, 80.0 GiB, compute capability 9.0; 1 x V100")

    def fails() -> None:
        raise RuntimeError("No CUDA GPUs are available\nmore")

    monkeypatch.setattr(torch.cuda, "init", fails)
    (found,) = doctor_stack._gpus()
    assert found.state == "fault" and found.found.endswith("No CUDA GPUs are available")
