"""What this machine has for ranks: GPUs, memory and an allocator. Imports no torch."""

from __future__ import annotations

import ctypes.util
import itertools
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lbr_dist.errors import LaunchError

if TYPE_CHECKING:
    import torch


def count_gpus() -> int:
    """CUDA devices that this process sees, counted from the driver's device files."""
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    return visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), present)


def visible_gpus(variable: str | None, present: int) -> int:
    """How many of a machine's GPUs CUDA shows for a value of `CUDA_VISIBLE_DEVICES`.

    As CUDA's programming guide defines it: indices or UUIDs, and only those before the first that is invalid.
    """
    if variable is None:
        return present
    named = [device.strip() for device in variable.split(",")]
    valid = itertools.takewhile(
        lambda name: int(name) < present if name.isdecimal() else name.startswith(("GPU-", "MIG-")), named
    )
    return min(present, len(list(valid)))


def omp_threads() -> int | None:
    """Threads of a process by `OMP_NUM_THREADS`; None if it is not set. OpenMP allows a list, one for each level.

    Raises:
        LaunchError: it is no such list.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not value:
        return None
    first = value.split(",")[0].strip()
    if not first.isdecimal() or not int(first):
        raise LaunchError(
            f"OMP_NUM_THREADS: found {value!r} in the environment, expected a positive number. Set it to the threads "
            "of one rank, or unset it."
        )
    return int(first)


def gpu_bytes() -> int | None:
    """The memory of the smallest GPU, from nvidia-smi: torch would take some of it; None if that gives no answer."""
    found = _ask_driver("memory.total")
    return int(min(map(float, found))) * 2**20 if found else None


def _ask_driver(what: str) -> list[str]:
    """A property of every GPU, as nvidia-smi prints it; empty if it gives no answer that is a number."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        return found if all(float(value) >= 0 for value in found) else []
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def has_bfloat16(gpus: int) -> bool:
    """Whether this machine's devices multiply bfloat16 in hardware.

    A CPU without such units emulates it: a plain matrix product takes 80 times as long as in float32.

    Args:
        gpus: how many GPUs are used; 0: the CPU is.
    """
    if gpus:
        capability = _ask_driver("compute_cap")
        # a driver that does not answer: every GPU since 2020 has them
        return not capability or min(float(line) for line in capability) >= 8.0
    flags = {flag for line in _cpu_lines() for flag in line.partition(":")[2].split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def fitting_dtype(gpus: int) -> Literal["bfloat16", "float32"]:
    """The dtype that `auto` means on this machine."""
    return "bfloat16" if has_bfloat16(gpus) else "float32"


def _cpu_lines() -> list[str]:
    """The lines of /proc/cpuinfo that list what the processor can do: `flags` on x86, `Features` on Arm."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(("flags", "Features"))]


def memory() -> tuple[int, int]:
    """Bytes of this machine's memory: available, and in total."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    sizes = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    return sizes["MemAvailable"], sizes["MemTotal"]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on a GPU, or that this process has held of the machine's memory, so far."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    # not ru_maxrss, which a child inherits from its parent
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def allocator() -> dict[str, str]:
    """Variables that preload tcmalloc on a CPU, if the system has it: it keeps the gigabytes that each step frees and
    takes again.

    glibc gives them back to the kernel, which clears every page anew: a quarter of a step's time. tcmalloc would give
    them back too, more slowly, unless it is told not to: a seventh of a step that keeps 7 GiB of graphs.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    if count_gpus() or library is None or "LD_PRELOAD" in os.environ:
        return {}
    return {"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"}
