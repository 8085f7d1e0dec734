"""The environment of a job."""

from __future__ import annotations

import pytest

from lbr_dist.slurm import scheduler


def test_the_environment_is_minimal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "OMP_NUM_THREADS", "HF_TOKEN", "MINE", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    found = scheduler.minimal_environment(["MINE"])
    assert found["MINE"] == found["SLURM_CONF"] == "x" and "PATH" in found
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "OMP_NUM_THREADS", "HF_TOKEN"} & set(found)
