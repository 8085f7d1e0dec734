"""Starts the ranks of a stage on this machine, and takes them all down when one of them dies."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from lbr_dist.errors import LaunchError
from lbr_dist.launch.preflight import count_gpus

USER_ERROR = 2  # a rank's exit code for an `LbrError`, whose message it has printed
GRACE_SECONDS = 10.0
TAIL_LINES = 25


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the launcher is killed


def _allocator() -> dict[str, str]:
    """On a CPU, preload tcmalloc where the system has it: it keeps the gigabytes that each step frees and takes again.

    glibc gives them back to the kernel, which clears every page anew: a quarter of a step's time. tcmalloc would give
    them back too, more slowly, unless it is told: a seventh of a step that keeps 7 GiB of graphs.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    if count_gpus() or library is None or "LD_PRELOAD" in os.environ:
        return {}
    return {"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"}


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_stage(stage: str, config_path: Path, ranks: int, log_folder: Path) -> None:
    """Run one stage on `ranks` processes; the first one has our terminal, the others a log file each.

    Raises:
        LaunchError: a rank died; the others have been stopped, and the message shows its last lines.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    allocator = _allocator()
    processes: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="lbr-") as folder:
        try:
            for rank in range(ranks):
                environment = (
                    os.environ
                    | allocator
                    | {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks),
                        "LBR_RENDEZVOUS": f"file://{folder}/rendezvous",
                        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks))),
                    }
                )
                log = None if rank == 0 else (log_folder / f"rank-{rank}.log").open("wb")
                if log is not None:
                    logs.append(log)
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "lbr_dist.launch.worker", stage, str(config_path)],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log and subprocess.STDOUT,
                        preexec_fn=_die_with_parent,
                    )
                )
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
            failed = [(i, p.returncode) for i, p in enumerate(processes) if p.returncode]
            if failed:
                time.sleep(0.5)  # the other ranks' own words about the same fault
                failed = [(i, p.returncode) for i, p in enumerate(processes) if p.poll()]
        finally:
            _stop(processes)
            for file in logs:
                file.close()
    if not failed:
        return
    rank, code = failed[0]
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    where = "its message is above" if rank == 0 else f"the end of {log_folder / f'rank-{rank}.log'}:\n"
    tail = "" if rank == 0 else _tail(log_folder / f"rank-{rank}.log")
    raise LaunchError(f"{stage}: rank {rank} {how}; all ranks were stopped; {where}{tail}")
