"""The check of a node: it must name each of these real faults, with exit code 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lbr_dist
from lbr_dist.launch.doctor import node as node_check
from tests.unit.launch.doctor.cases import environment, lbr, mounted, script, states, two_gpus

SMI_ROW = "{0}, NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15, {1}"


def node(*arguments: str, **how: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and findings of the node check, which prints one line."""
    done = lbr("--node", "--json", *arguments, **how)
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n"), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"node", "findings"}
    for finding in report["findings"]:
        assert set(finding) == {"name", "state", "found", "advice"} and finding["found"]
        assert bool(finding["advice"]) == (finding["state"] != "ok")
    assert (done.returncode == 1) == ("fault" in states(report["findings"]).values())
    return done.returncode, {finding["name"]: finding for finding in report["findings"]}


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
    assert code == 1 and "does not exist" in found["run folder"]["found"]
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
    # the file that was begun is deleted again
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


def test_file_that_reads_back_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"stale")
    (found,) = [f for f in node_check.check_node(tmp_path, None) if f.name == "run folder"]
    assert found.state == "fault" and "not what was written" in found.found and not list(tmp_path.iterdir())


def test_as_many_gpus_as_wanted(tmp_path: Path) -> None:
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
    # a child process keeps the output open
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


def test_missing_packages() -> None:
    # no site-packages, as on a node that has not mounted the environment
    code = "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]"
    root = str(Path(lbr_dist.__file__).parents[1])
    exit_code, found = node("--gpus", "1", code=code, PYTHONPATH=root)
    assert exit_code == 1 and found["packages"]["found"] == "torch, deepspeed, transformers cannot be imported"
    # the rest of the check needs none of them
    assert found["GPUs"]["found"].startswith("0 in /dev")
