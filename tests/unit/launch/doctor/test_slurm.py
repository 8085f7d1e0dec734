"""The check of Slurm, with scripts in place of its programs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lbr_dist.launch.doctor import slurm as doctor_slurm
from lbr_dist.launch.doctor.findings import Finding
from tests.unit.launch.doctor.cases import script

CONFIG = """Configuration data as of 2026-11-26T11:00:00
JobRequeue              = {requeue}
KillWait                = 30 sec
PreemptMode             = {preempt}
PreemptType             = preempt/qos
"""


def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, Finding]:
    texts = {
        "version": "slurm 24.05.1",
        "ping": "Slurmctld(primary) at head is UP",
        "sinfo": "batch*|up|2-00:00:00|3|idle|gpu:h100:8\nbatch*|up|2-00:00:00|1|down*|gpu:h100:8",
        "sacct": "exit 0",
        "config": CONFIG.format(requeue=1, preempt="OFF"),
    } | changes
    folder.mkdir(exist_ok=True)
    for name in ("version", "ping", "sinfo", "config"):
        (folder / f"{name}.txt").write_text(texts[name] + "\n")
    here = f"cd {folder}"
    script(
        folder,
        "scontrol",
        f'{here}; case "$1" in --version) cat version.txt;; ping) cat ping.txt; ! grep -q DOWN ping.txt;;'
        " *) cat config.txt;; esac",
    )
    script(folder, "sinfo", f"{here}; cat sinfo.txt")
    script(folder, "sacct", texts["sacct"])
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("SLURM_CONF", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return {finding.name: finding for finding in doctor_slurm.check_slurm()}


def test_good_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster(tmp_path, monkeypatch)
    assert {finding.state for finding in found.values()} == {"ok"}
    expected = "default, up, time limit 2-00:00:00; nodes: 3 idle, 1 down*; gpu:h100:8"
    assert found["partition batch"].found == expected and "30 sec" in found["kill wait"].found
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert "in job 17" in doctor_slurm.check_slurm()[-1].found


SLURM = {
    "controller down": ({"ping": "Slurmctld(primary) at head is DOWN\n** RESTORE **"}, "controller", "fault", "DOWN"),
    "no partition": ({"sinfo": ""}, "partitions", "fault", "none that you may use"),
    "partition down": ({"sinfo": "a|down|infinite|3|idle|(null)"}, "partition a", "warning", "no gres"),
    "all nodes down": ({"sinfo": "a|up|1:00|3|drained|g\na|up|1:00|1|idle*|g"}, "partition a", "warning", "1 idle*"),
    "no accounting": (
        {"sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1"},
        "accounting",
        "warning",
        "storage is disabled",
    ),
    "no requeue": ({"config": CONFIG.format(requeue=0, preempt="OFF")}, "requeue", "warning", "JobRequeue=0"),
    "preempted jobs end": ({"config": CONFIG.format(requeue=1, preempt="CANCEL")}, "preemption", "warning", "CANCEL"),
    "preempted jobs wait": (
        {"config": CONFIG.format(requeue=1, preempt="GANG,SUSPEND")},
        "preemption",
        "warning",
        "SUSPEND",
    ),
    "no settings": ({"config": "nothing"}, "rules", "warning", "JobRequeue"),
}


@pytest.mark.parametrize("case", SLURM)
def test_cluster_with_a_fault(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, name, state, text = SLURM[case]
    found = cluster(tmp_path, monkeypatch, **changes)
    assert found[name].state == state and text in found[name].found and found[name].advice
    assert "RESTORE" not in found[name].found


def test_controller_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "scontrol", '[ "$1" = --version ] && exec echo slurm 24; sleep 60 & wait')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    began = time.monotonic()
    assert doctor_slurm.check_slurm()[-1].found == "scontrol gave no answer within 5 s"
    assert time.monotonic() - began < 20


def test_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.state for finding in doctor_slurm.check_slurm()] == ["ok"]
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert [finding.state for finding in doctor_slurm.check_slurm()] == ["warning"]
    script(tmp_path, "scontrol", "echo 'scontrol: fatal: no configuration source' >&2; exit 1")
    assert [finding.state for finding in doctor_slurm.check_slurm()] == ["ok", "warning"]
    monkeypatch.setenv("SLURM_CONF", "/nonexistent/slurm.conf")
    (finding,) = doctor_slurm.check_slurm()
    assert finding.state == "fault" and finding.found == "SLURM_CONF=/nonexistent/slurm.conf does not exist"
