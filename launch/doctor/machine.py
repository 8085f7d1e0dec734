"""The checks of this machine by `lbr doctor`: packages, cores, memory, limits, disks, MPI. Imports no torch."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from pathlib import Path

from lbr_dist.config import DataConfig
from lbr_dist.console import size_text
from lbr_dist.launch.doctor.findings import Finding, ask, fault, ok, warning, within
from lbr_dist.launch.doctor.node import LOW_BYTES, check_memory, check_room, check_shared, check_temporary
from lbr_dist.ranks.hardware import has_bfloat16

OPEN_FILES = 4096
"""The more ranks, the more files, sockets and pipes each one opens; a login shell often allows only 1,024."""

_EXTRAS = ("cuda", "mpi", "mining", "tracking", "eval")
"""The extras in setup.py, without those for developers."""


# ---- packages ------------------------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    """`2.10.0+cu128` as (2, 10): minimum versions name no builds, and trailing zeros do not count."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_python() -> list[Finding]:
    """Compare Python and the packages with the minimum versions in the metadata of lbr-dist, from setup.py."""
    findings = [ok("Python", f"{platform.python_version()}, {sys.executable}")]
    try:
        about = importlib.metadata.metadata("lbr-dist")
        required = importlib.metadata.requires("lbr-dist") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "Run `pip install -e .` in the repository, so that its requirements are known and installed."
        return [*findings, warning("lbr-dist", "is not installed; it runs from its source", advice)]
    floor = about["Requires-Python"].removeprefix(">=") if "Requires-Python" in about else ""
    if _numbers(platform.python_version()) < _numbers(floor):
        advice = f"Create the environment again with Python {floor} or newer."
        findings = [fault("Python", f"{platform.python_version()}, {sys.executable}", advice)]
    good: list[str] = []
    optional: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    for line in required:
        matched = re.match(r"([\w.-]+)(?:>=([\w.]+))?[^;]*(?:;.*extra == [\"'](\w+)[\"'])?", line)
        assert matched is not None, line
        name, least, extra = matched.groups()
        if extra is not None and extra not in _EXTRAS:
            continue
        wanted = f"{name}>={least}" if least else name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra is None:
                findings.append(fault(name, f"not installed, {wanted} is needed", f"pip install '{wanted}'"))
            else:
                optional[extra].append(f"no {name}")
            continue
        if least and _numbers(version) < _numbers(least):
            make = fault if extra is None else warning
            findings.append(make(name, f"{version}, {wanted} is needed", f"pip install --upgrade '{wanted}'"))
        elif extra is None:
            good.append(f"{name}=={version}")
        else:
            optional[extra].append(f"{name}=={version}")
    findings.insert(1, ok("packages", f"{len(good)} are recent enough: {', '.join(good)}"))
    extras = "; ".join(f"{extra}: {', '.join(names)}" for extra, names in optional.items() if names)
    return [*findings, ok("extras", f"{extras} (pip install 'lbr-dist[EXTRA]')")] if extras else findings


# ---- cores, memory and limits --------------------------------------------------------------------------------------


def check_limits(gpus: int) -> list[Finding]:
    """Cores, memory, process limits, and on a CPU the allocator."""
    cores, inside = len(os.sched_getaffinity(0)), os.cpu_count()
    found = [ok("cores", f"{cores}" if cores == inside else f"{cores} of {inside}: this process may use no more")]
    found += within("memory", lambda: [check_memory()])
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < OPEN_FILES:
        how = "Ask your administrators for more" if hard < OPEN_FILES else f"Run `ulimit -n {min(hard, 65536):.0f}`"
        advice = f"{how}, here and in jobs: many ranks need more than {OPEN_FILES:,} at a time."
        found.append(warning("open files", f"at most {soft:,.0f} (ulimit -n)", advice))
    else:
        found.append(ok("open files", f"at most {soft:,.0f} (ulimit -n)"))
    if gpus:
        locked = _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
        if locked == float("inf"):
            found.append(ok("locked memory", "unlimited (ulimit -l)"))
        else:
            advice = "NCCL registers memory for InfiniBand: `ulimit -l unlimited`, or set PropagateResourceLimitsExcept"
            found.append(warning("locked memory", f"at most {size_text(locked)} (ulimit -l)", advice))
        return found
    if has_bfloat16(0):
        found.append(ok("bfloat16", "this CPU has units for it: model.dtype `auto` is bfloat16"))
    else:
        advice = "Leave model.dtype at `auto`, which is float32 here: bfloat16 would take many times as long."
        found.append(warning("bfloat16", "this CPU has no units for it", advice))
    library = ctypes.util.find_library("tcmalloc_minimal")
    if library is None:
        advice = "A step on a CPU takes about a quarter longer without it. Run `apt-get install libtcmalloc-minimal4`."
        return [*found, warning("tcmalloc", "not found", advice)]
    return [*found, ok("tcmalloc", f"{library}, preloaded into ranks on a CPU")]


def _limit(value: int) -> float:
    return float("inf") if value == resource.RLIM_INFINITY else value


# ---- disks ---------------------------------------------------------------------------------------------------------


def check_disks(run_dir: Path, min_free_bytes: int) -> list[Finding]:
    """Room for checkpoints, token caches, temporary files and shared memory."""
    findings = within("run folder", lambda: [_folder("run folder", run_dir, min_free_bytes)])
    findings += within("data cache", lambda: [_folder("data cache", Path(DataConfig.cache_dir).expanduser(), 0)])
    findings += within("temporary folder", lambda: [check_temporary()])
    return findings + within("/dev/shm", lambda: [check_shared()])


def _folder(name: str, folder: Path, min_free_bytes: int) -> Finding:
    """Check a folder that a run makes if it does not exist."""
    if folder.is_dir():
        return check_room(name, folder.absolute(), min_free_bytes)
    if folder.exists():
        return fault(name, f"{folder} is not a folder", "Move it away, or name another.")
    parent = next(above for above in folder.absolute().parents if above.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        return fault(name, f"{folder} does not exist, and {parent} cannot be written", "Name another folder.")
    free = shutil.disk_usage(parent).free
    found = f"{folder}: does not exist yet, {size_text(free)} free"
    if free < min_free_bytes:
        return fault(
            name, found, f"Make room: {size_text(min_free_bytes)} are required (--min-free-gb). Or name another."
        )
    return warning(name, found, "Make room, or name another folder.") if free < LOW_BYTES else ok(name, found)


# ---- MPI -----------------------------------------------------------------------------------------------------------


def check_mpi() -> list[Finding]:
    """mpirun and mpi4py, and whether both belong to the same MPI. Ranks started without MPI need neither."""
    answer = ask("mpirun", "--version")
    lines = answer.text.strip().splitlines()
    if answer.missing:
        findings = [ok("mpirun", "not on PATH; only ranks started by MPI need it")]
    elif answer.failure is not None or not lines:
        advice = "Load another MPI (module load), or start ranks without it."
        findings = [warning("mpirun", answer.failure or "mpirun printed no version", advice)]
    else:
        findings = [ok("mpirun", f"{lines[0].strip()}, {shutil.which('mpirun')}")]
    if importlib.util.find_spec("mpi4py") is None:
        install = "pip install 'lbr-dist[mpi]'"
        return [*findings, ok("mpi4py", f"not installed; only ranks started by MPI need it ({install})")]
    # the version is known without MPI_Init, which may hang inside a job
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = ask(sys.executable, "-c", code)
    if library.failure is not None:
        advice = "Load the MPI it was built with, or build it again: pip install --no-binary mpi4py mpi4py"
        return [*findings, warning("mpi4py", f"does not import: {library.failure}", advice)]
    found = f"{importlib.metadata.version('mpi4py')} with {library.text.split(',')[0].splitlines()[0].strip()}"
    if lines and ("Open MPI" in answer.text) != ("Open MPI" in library.text):
        advice = "Each rank would see only itself. Put that library's mpirun first on PATH."
        return [*findings, warning("mpi4py", f"{found}, which is not mpirun's MPI", advice)]
    return [*findings, ok("mpi4py", found)]
