"""`lbr doctor`, and the check of a node: real faults, each of which it must name, with an exit code of 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lbr_dist
from lbr_dist.launch import cli
from lbr_dist.launch.doctor import command as doctor
from lbr_dist.launch.doctor import machine as doctor_machine
from lbr_dist.launch.doctor import node as node_check
from lbr_dist.launch.doctor import slurm as doctor_slurm
from lbr_dist.launch.doctor import stack as doctor_stack
from lbr_dist.launch.doctor.findings import Finding, ask, fault, ok, warning, within

SMI_ROW = "{0}, NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15, {1}"


def script(folder: Path, name: str, text: str) -> Path:
    """A program of a name, in a folder that is to be on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return folder


def mounted(*commands: str) -> list[str]:
    """What is put before a command, to run it where these mounts are, and nobody else sees them."""
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    steps = " && ".join([*commands, 'exec "$@"'])
    return ["unshare", *user, "--mount", "--propagation", "private", "sh", "-c", steps, "sh"]


def two_gpus(folder: Path) -> list[str]:
    """Before a command: a /dev with two GPUs, as far as names go, and 32 MiB of shared memory."""
    nodes = [f"touch {folder}/{name} && mount --bind /dev/{name} {folder}/{name}" for name in ("null", "urandom")]
    return mounted(
        f"mkdir {folder}",
        f"mount -t tmpfs tmpfs {folder}",
        *nodes,
        f"touch {folder}/nvidia0 {folder}/nvidia1 {folder}/nvidiactl",
        f"mkdir {folder}/shm && mount -t tmpfs -o size=32m tmpfs {folder}/shm",
        f"mount --rbind {folder} /dev",
    )


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, without what a job or a cluster set, and with changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLOO"))}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {name: value for name, value in (kept | changes).items() if value is not None}


def lbr(
    *arguments: str, before: Sequence[str] = (), code: str = "", **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """`lbr doctor` in a process of its own, after some code; a traceback is never right."""
    start = ["-c", f"{code}; import sys; from lbr_dist.launch.cli import main; sys.exit(main())"]
    command = [*before, sys.executable, *(start if code else ["-m", "lbr_dist.launch.cli"]), "doctor", *arguments]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def states(findings: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {finding["name"]: finding["state"] for finding in findings}


def node(*arguments: str, **how: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and findings of the node check, whose answer is one line."""
    done = lbr("--node", "--json", *arguments, **how)
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n"), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"node", "findings"}
    for finding in report["findings"]:
        assert set(finding) == {"name", "state", "found", "advice"} and finding["found"]
        assert bool(finding["advice"]) == (finding["state"] != "ok")
    assert (done.returncode == 1) == ("fault" in states(report["findings"]).values())
    return done.returncode, {finding["name"]: finding for finding in report["findings"]}


# ---- a node --------------------------------------------------------------------------------------------------------


def test_good_node(tmp_path: Path) -> None:
    began = time.perf_counter()
    code, found = node("--run-dir", str(tmp_path))
    print(f"the check of a node took {time.perf_counter() - began:.2f} s")
    assert code == 0 and found["run folder"]["state"] == "ok" and list(tmp_path.iterdir()) == []
    assert {"packages", "temporary folder", "memory"} <= found.keys() and "GPUs" not in found


def test_node_is_named_as_slurm_does() -> None:
    assert json.loads(lbr("--node", "--json", SLURMD_NODENAME="gpu017").stdout)["node"] == "gpu017"


def test_node_check_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from lbr_dist.launch.doctor.node import check_node;"
        "check_node(Path(), 1); sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_run_folder_that_is_missing_or_a_file(tmp_path: Path) -> None:
    code, found = node("--run-dir", str(tmp_path / "gone"))
    assert code == 1 and "is not there" in found["run folder"]["found"]
    (tmp_path / "file").touch()
    code, found = node("--run-dir", str(tmp_path / "file"))
    assert code == 1 and "is not a folder" in found["run folder"]["found"]


def test_run_folder_that_is_read_only(tmp_path: Path) -> None:
    code, found = node("--run-dir", str(tmp_path), before=mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}"))
    assert code == 1 and "Read-only file system" in found["run folder"]["found"]


def test_run_folder_that_is_full(tmp_path: Path) -> None:
    before = mounted(f"mount -t tmpfs -o size=16k tmpfs {tmp_path}")
    code, found = node("--run-dir", str(tmp_path), before=before)
    assert code == 1 and "No space left" in found["run folder"]["found"]
    # what was begun is gone again
    listing = (
        "from pathlib import Path; from lbr_dist.launch.doctor.node import check_node;"
        f"folder = Path({str(tmp_path)!r}); check_node(folder, 0); print(*folder.iterdir())"
    )
    assert subprocess.check_output([*before, sys.executable, "-c", listing], env=environment(), text=True) == "\n"


def test_too_little_room(tmp_path: Path) -> None:
    before = mounted(f"mount -t tmpfs -o size=8m tmpfs {tmp_path}")
    code, found = node("--run-dir", str(tmp_path), before=before, TMPDIR=str(tmp_path))
    assert code == 0 and found["run folder"]["state"] == found["temporary folder"]["state"] == "warning"
    assert f"{tmp_path}: 8.0 MiB free" in found["temporary folder"]["found"]
    code, found = node("--run-dir", str(tmp_path), "--min-free-gb", "0.1", before=before)
    assert code == 1 and "--min-free-gb" in found["run folder"]["advice"]


def test_file_that_is_read_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"stale")
    (found,) = [f for f in node_check.check_node(tmp_path, None) if f.name == "run folder"]
    assert found.state == "fault" and "not what was written" in found.found and not list(tmp_path.iterdir())


def test_gpus_that_are_there(tmp_path: Path) -> None:
    rows = "; ".join(f"echo '{SMI_ROW.format(number, 0)}'" for number in range(2))
    how: dict[str, Any] = {"before": two_gpus(tmp_path / "dev")}
    how["PATH"] = str(script(tmp_path / "bin", "nvidia-smi", rows)) + ":/usr/bin:/bin"
    code, found = node("--gpus", "2", CUDA_VISIBLE_DEVICES=None, **how)
    assert code == 0 and found["GPUs"]["found"] == "2 in /dev, 2 wanted"
    assert found["driver"]["found"] == "570.86.15: 2 x NVIDIA H100 80GB HBM3, 81559 MiB"
    assert found["/dev/shm"]["state"] == "warning" and "--shm-size" in found["/dev/shm"]["advice"]


def test_fewer_gpus_than_wanted(tmp_path: Path) -> None:
    how: dict[str, Any] = {"before": two_gpus(tmp_path / "dev"), "CUDA_VISIBLE_DEVICES": "1"}
    how["PATH"] = str(script(tmp_path / "bin", "nvidia-smi", f"echo '{SMI_ROW.format(0, 0)}'")) + ":/usr/bin:/bin"
    code, found = node("--gpus", "2", **how)
    assert code == 1 and found["GPUs"]["state"] == "fault"
    assert found["GPUs"]["found"] == "1 in /dev (CUDA_VISIBLE_DEVICES='1'), 2 wanted"
    assert found["driver"]["state"] == "fault" and "lists 1 GPUs" in found["driver"]["found"]


SMI = {
    "fails": ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "fault", "code 9: NVIDIA-SMI has failed: no driver"),
    "crashes": ("kill -ABRT $$", "fault", "killed by SIGABRT"),
    "lists too few": (f"echo '{SMI_ROW.format(0, 0)}'", "fault", "lists 1 GPUs without error, 2 wanted"),
    "lists none": ("echo 'No devices were found'", "fault", "'No devices were found'"),
    "lost one": (
        f"echo '{SMI_ROW.format(0, 0)}'; echo '{SMI_ROW.format(1, 0)}'; echo '2, [GPU is lost], [N/A], 570.86.15, 0'",
        "fault",
        "GPU is lost",
    ),
    "memory errors": (
        f"echo '{SMI_ROW.format(0, 0)}'; echo '{SMI_ROW.format(1, 3)}'",
        "warning",
        "uncorrected errors on GPU 1",
    ),
    "no ECC": (f"echo '{SMI_ROW.format(0, '[N/A]')}'; echo '{SMI_ROW.format(1, '[N/A]')}'", "ok", "570.86.15: 2 x"),
    # what holds the output open outlives the script
    "hangs": ("sleep 60 & wait", "fault", "gave no answer within 0.5 s"),
    "cannot start": ("", "fault", "cannot be started"),
}


@pytest.mark.parametrize("case", SMI)
def test_driver(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, state, found = SMI[case]
    bin_ = script(tmp_path / "bin", "nvidia-smi", text)
    if case == "cannot start":
        (bin_ / "nvidia-smi").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(node_check, "HANGS_SECONDS", 0.5 if case == "hangs" else 30.0)
    began = time.monotonic()
    (finding,) = node_check.check_driver(2)
    assert finding.name == "driver" and finding.state == state and found in finding.found, finding
    assert time.monotonic() - began < 20


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_check.check_driver(1)[0].state == "warning"


def test_first_node(tmp_path: Path) -> None:
    bin_ = script(tmp_path / "bin", "scontrol", '[ "$1 $2 $3" = "show hostnames gone[1-2]" ] && echo gone1.invalid')
    code, found = node(SLURM_JOB_NODELIST="gone[1-2]", PATH=f"{bin_}:/usr/bin:/bin")
    assert code == 1 and found["first node"]["state"] == "fault"
    alone = {"PATH": str(tmp_path)}
    assert node(SLURM_JOB_NODELIST="localhost", **alone)[1]["first node"]["state"] == "ok"
    assert "first node" not in node(SLURM_JOB_NODELIST="gone[1-2]", **alone)[1]


def test_package_whose_files_are_gone() -> None:
    # no site-packages, as where a node has not mounted the environment
    code = "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]"
    root = str(Path(lbr_dist.__file__).parents[1])
    exit_code, found = node("--gpus", "1", code=code, PYTHONPATH=root)
    assert exit_code == 1 and found["packages"]["found"] == "torch, deepspeed, transformers cannot be imported"
    # the rest of the check needs none of them
    assert found["GPUs"]["found"].startswith("0 in /dev")


# ---- asking what hangs or fails ------------------------------------------------------------------------------------


def test_ask_keeps_what_came_in_time() -> None:
    began = time.monotonic()
    answer = ask("sh", "-c", "sleep 60 & echo $!; sleep 60", seconds=1)
    assert answer.failure == "sh gave no answer within 1 s" and not answer.missing
    assert time.monotonic() - began < 15
    assert answer.text.strip().isdigit()
    child = Path("/proc", answer.text.strip(), "stat")  # what it started is dead too, or will be in a moment
    while child.exists() and child.read_text().split()[2] not in "ZX":
        assert time.monotonic() - began < 15
        time.sleep(0.05)
    assert ask("no-such-program").missing


def test_check_that_hangs_or_fails() -> None:
    began = time.monotonic()
    (found,) = within("hung", lambda: time.sleep(30) or [], seconds=0.2)
    assert found.state == "fault" and found.name == "hung" and "within 0.2 s" in found.found
    assert time.monotonic() - began < 15
    (found,) = within("broken", lambda: [ok("division", str(1 // 0))])
    assert found.state == "fault" and "ZeroDivisionError" in found.found
    (found,) = within("missing", lambda: [ok("file", Path("/proc/none").read_text())])
    assert found.state == "fault" and found.found == "/proc/none: No such file or directory"


# ---- packages, limits, MPI -----------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, version: str, *lines: str) -> None:
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    about.joinpath("METADATA").write_text("\n".join((f"Name: {name}", f"Version: {version}", *lines)) + "\n")


def findings_in_process(call: str, *before: str, **changes: str) -> list[Finding]:
    """Findings of a call in another process."""
    code = (
        "import json; from dataclasses import asdict; from lbr_dist.launch.doctor import machine as m;"
        f"print(json.dumps([asdict(f) for f in {call}]))"
    )
    command = [*before, sys.executable, "-c", code]
    return [Finding(**f) for f in json.loads(subprocess.check_output(command, env=environment(**changes)))]


def test_packages_below_their_floors(tmp_path: Path) -> None:
    distribution(
        tmp_path,
        "lbr-dist",
        "9.0",
        *(f"Requires-Dist: {what}" for what in ("numpy>=1.26", "xxhash>=3.4", "not-there>=1.2", "rich>=13.0")),
        *(f'Requires-Dist: {what}; extra == "mpi"' for what in ("mpi4py>=4", "absent>=1")),
        'Requires-Dist: unwanted>=1; extra == "dev"',
    )
    distribution(tmp_path, "xxhash", "3.3.9")
    distribution(tmp_path, "rich", "13")
    distribution(tmp_path, "mpi4py", "3.1")
    found = {f.name: f for f in findings_in_process("m.check_python()", PYTHONPATH=str(tmp_path))}
    assert found["xxhash"].state == "fault" and found["xxhash"].found == "3.3.9, xxhash>=3.4 is needed"
    assert found["not-there"].state == "fault" and found["not-there"].advice == "pip install 'not-there>=1.2'"
    assert found["mpi4py"].state == "warning" and "unwanted" not in found
    assert found["packages"].found.startswith("2 at their floors") and "rich==13" in found["packages"].found
    assert "mpi: no absent" in found["extras"].found


def test_python_below_its_floor(tmp_path: Path) -> None:
    distribution(tmp_path, "lbr-dist", "9.0", "Requires-Python: >=4.1")
    found = {f.name: f for f in findings_in_process("m.check_python()", PYTHONPATH=str(tmp_path))}
    assert found["Python"].state == "fault" and "4.1" in found["Python"].advice


def test_versions() -> None:
    numbers = doctor_machine._numbers
    assert numbers("2.10.0+cu128") == numbers("2.10") > numbers("2.9.1") and numbers("13") == numbers("13.0")


def test_limits_that_are_low() -> None:
    low = ["sh", "-c", 'ulimit -n 512 && ulimit -l 64 && exec "$@"', "sh"]
    found = {f.name: f for f in findings_in_process("m.check_limits(1)", *low)}
    assert found["open files"].state == "warning" and "512 (ulimit -n)" in found["open files"].found
    assert found["locked memory"].state == "warning" and "tcmalloc" not in found
    assert "Ask your administrators" in found["open files"].advice  # the hard limit is as low
    soft = ["sh", "-c", 'ulimit -Sn 1024 && exec "$@"', "sh"]
    found = {f.name: f for f in findings_in_process("m.check_limits(0)", *soft)}
    assert "Ulimit -n" in found["open files"].advice and "locked memory" not in found and "tcmalloc" in found


def test_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert doctor_machine.check_mpi()[0].state == "ok"
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin", "mpirun", "echo 'HYDRA build details: 4.2'")))
    package = tmp_path / "site" / "mpi4py"
    package.mkdir(parents=True)
    distribution(tmp_path / "site", "mpi4py", "4.1")
    package.joinpath("__init__.py").write_text("class rc: pass\n")
    package.joinpath("MPI.py").write_text("def Get_library_version(): return 'Open MPI v4.1.4, package: Debian'\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    mpirun, mpi4py = doctor_machine.check_mpi()
    assert mpirun.state == "ok" and "HYDRA" in mpirun.found
    assert mpi4py == warning("mpi4py", "4.1 with Open MPI v4.1.4, which is not mpirun's MPI", mpi4py.advice)
    package.joinpath("MPI.py").write_text("raise ImportError('libmpi.so.40: cannot open shared object file')\n")
    assert doctor_machine.check_mpi()[1].state == "warning"
    assert "libmpi.so.40" in doctor_machine.check_mpi()[1].found
    script(tmp_path / "bin", "mpirun", "exit 127")
    assert doctor_machine.check_mpi()[0].state == "warning"


def test_folders_that_a_run_makes(tmp_path: Path) -> None:
    assert doctor_machine._folder("run folder", tmp_path / "a" / "b", 0).state == "ok"
    assert "to be made" in doctor_machine._folder("run folder", tmp_path / "a" / "b", 0).found
    assert doctor_machine._folder("run folder", tmp_path / "a", 2**60).state == "fault"
    (tmp_path / "file").touch()
    assert doctor_machine._folder("run folder", tmp_path / "file", 0).state == "fault"
    call = f"[m._folder('run folder', m.Path({str(tmp_path / 'a')!r}), 0)]"
    (found,) = findings_in_process(call, *mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}"))
    assert found.state == "fault" and "cannot be written" in found.found


# ---- Slurm, by programs that answer as its own do ------------------------------------------------------------------

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
    assert finding.state == "fault" and finding.found == "SLURM_CONF=/nonexistent/slurm.conf is not there"


# ---- all of it -----------------------------------------------------------------------------------------------------


def test_all_as_json(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = lbr("--json", "--run-dir", str(tmp_path / "run"), PATH=str(tmp_path / "bin"))
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["faults"] == 0, done.stdout
    found = {(f["topic"], f["name"]): f for f in report["findings"]}
    assert "to be made" in found["Disks", "run folder"]["found"] and not (tmp_path / "run").exists()
    assert "no Slurm here" in found["Slurm", "client"]["found"]
    of_torch = {name for topic, name in found if topic == "torch, GPUs and kernels"}
    assert of_torch == {"torch", "devices", "gloo", "attention", "InfoNCE", "cross-entropy", "DeepSpeed"}
    assert "`auto` takes tiles" in found["torch, GPUs and kernels", "attention"]["found"]


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
    # what a library prints is no finding
    text = "import os; os.write(1, b'{noise}\\n'); raise ImportError('libcudart.so.12: cannot open shared object file')"
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.check_torch()
    assert finding.state == "fault" and "libcudart.so.12" in finding.found


def test_gpus_that_torch_cannot_use(tmp_path: Path) -> None:
    command = [*two_gpus(tmp_path / "dev"), sys.executable, "-m", "lbr_dist.launch.doctor.stack"]
    printed = subprocess.check_output(command, env=environment(CUDA_VISIBLE_DEVICES=None), text=True)
    found = states([json.loads(line) for line in printed.splitlines()])
    # of a build without CUDA the first, of one with CUDA the second: names in /dev are no GPUs
    assert "fault" in (found["torch"], found.get("devices"))


def test_gpus_as_torch_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPUs that are made up: one is missing, one is busy and old."""
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
