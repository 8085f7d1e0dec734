"""Packages, limits, disks and MPI of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_dist.launch.doctor import machine as doctor_machine
from lbr_dist.launch.doctor.findings import Finding, warning
from tests.unit.launch.doctor.cases import environment, mounted, script


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
    assert found["packages"].found.startswith("2 are recent enough") and "rich==13" in found["packages"].found
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
    assert "Run `ulimit -n" in found["open files"].advice and "locked memory" not in found and "tcmalloc" in found


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
    assert "does not exist yet" in doctor_machine._folder("run folder", tmp_path / "a" / "b", 0).found
    assert doctor_machine._folder("run folder", tmp_path / "a", 2**60).state == "fault"
    (tmp_path / "file").touch()
    assert doctor_machine._folder("run folder", tmp_path / "file", 0).state == "fault"
    call = f"[m._folder('run folder', m.Path({str(tmp_path / 'a')!r}), 0)]"
    (found,) = findings_in_process(call, *mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}"))
    assert found.state == "fault" and "cannot be written" in found.found
