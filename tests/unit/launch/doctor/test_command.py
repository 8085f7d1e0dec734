"""The whole of `lbr doctor`: its JSON, its table, and a torch that crashes or hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_dist.launch import cli
from lbr_dist.launch.doctor import command as doctor
from lbr_dist.launch.doctor.findings import fault, ok
from tests.unit.launch.doctor.cases import lbr


def test_all_as_json(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = lbr("--json", "--run-dir", str(tmp_path / "run"), PATH=str(tmp_path / "bin"))
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["faults"] == 0, done.stdout
    found = {(f["topic"], f["name"]): f for f in report["findings"]}
    assert "does not exist yet" in found["Disks", "run folder"]["found"] and not (tmp_path / "run").exists()
    assert "no Slurm here" in found["Slurm", "client"]["found"]
    of_torch = {name for topic, name in found if topic == "torch, GPUs and kernels"}
    assert of_torch == {"torch", "devices", "gloo", "attention", "InfoNCE", "cross-entropy", "DeepSpeed"}
    assert "`auto` picks tiles" in found["torch, GPUs and kernels", "attention"]["found"]


def test_all_with_faults_as_a_table(tmp_path: Path) -> None:
    low = ["sh", "-c", 'ulimit -n 512 && exec "$@"', "sh"]
    secret = "hunter2-of-the-environment"
    faults = {"GLOO_SOCKET_IFNAME": "nothere", "SLURM_CONF": "/nonexistent", "DS_ACCELERATOR": "cuda"}
    done = lbr("--gpus", "3", "--run-dir", str(tmp_path), before=low, WANDB_API_KEY=secret, COLUMNS="100", **faults)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    assert "\033" not in done.stdout and secret not in done.stdout
    marked = {line[6:].split("  ")[0].strip() for line in lines if line.startswith("  !!  ")}
    assert marked >= {"GPUs", "gloo", "DeepSpeed", "client"}
    assert any(line.startswith("  ??  open files") for line in lines)
    faults_found, warnings = (sum(line.startswith(f"  {mark}  ") for line in lines) for mark in ("!!", "??"))
    assert lines[-1] == f"{faults_found} faults (!!), {warnings} warning{'s' * (warnings > 1)} (??)"
    assert sum("-> " in line for line in lines) == faults_found + warnings
    assert all(len(line) <= 100 or " " not in line.strip() for line in lines)


def test_crash_of_torch_and_missing_packages(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    code = "import sys; sys.modules.update(dict.fromkeys(('xxhash', 'yaml', 'rich')))"
    done = lbr("--json", code=code, PYTHONPATH=str(tmp_path))
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and "was killed by SIGSEGV when torch was imported" in found["torch"]["found"]
    assert {"cores", "run folder", "mpirun", "client"} <= found.keys()


def test_hang_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "TORCH_SECONDS", 1.0)
    (finding,) = doctor.check_torch()
    assert finding.state == "fault" and "gave no answer within 1 s when torch was imported" in finding.found


def test_torch_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a library prints is not a finding
    text = "import os; os.write(1, b'{noise}\\n'); raise ImportError('libcudart.so.12: cannot open shared object file')"
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.check_torch()
    assert finding.state == "fault" and "libcudart.so.12" in finding.found


@pytest.mark.gpu
def test_gpus_that_work() -> None:
    done = lbr("--json", "--gpus", "1", CUDA_VISIBLE_DEVICES=None, DS_ACCELERATOR=None)
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["nccl"]["state"] == found["devices"]["state"] == found["GPUs"]["state"] == "ok", done.stdout
    assert "accelerator cuda" in found["DeepSpeed"]["found"] and "on cuda" in found["attention"]["found"]


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--gpus", "-1"], ["--min-free-gb", "nan"], ["--min-free-gb", "inf"]):
        assert cli.main(["doctor", *arguments]) == 1
        assert capsys.readouterr().err.startswith(f"error: {arguments[0]}: found ")


def test_table_on_a_terminal() -> None:
    topics = {"Empty": [], "Topic": [ok("a", "fine"), fault("longer", "word " * 30, "do " * 40)]}
    plain = doctor.table(topics, 60).splitlines()
    assert plain[:2] == ["Topic", "  ok  a       fine"] and plain[-1] == "1 fault (!!), no warnings"
    assert max(map(len, plain)) <= 60
    path = f"/{'long-folder/' * 10}file"  # to be copied, so never broken
    assert any(line.endswith(path) for line in doctor.table({"T": [ok("a", f"see {path}")]}, 60).splitlines())
    coloured = doctor.table(topics, 60, colours=True)
    assert "\033[31m!!\033[0m" in coloured and "\033[1mTopic\033[0m" in coloured
