"""Starts the ranks of a stage on this machine, and stops all of them when one dies."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import IO

from lbr_dist.errors import EXIT_HUNG, EXIT_INTERRUPTED, Interrupted, LaunchError
from lbr_dist.launch.first_output import FirstOutput
from lbr_dist.ranks.hardware import allocator, omp_threads
from lbr_dist.ranks.interrupt import taking_stops
from lbr_dist.ranks.watchdog import STACKS_SIGNAL
from lbr_dist.storage.files import make_private
from lbr_dist.storage.lock import HELD

GRACE_SECONDS = 10.0
TAIL_LINES = 25


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the launcher is killed


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _last_words(folder: Path, rank: int, ranks: int) -> str:
    """A rank's last error, or another rank's if it has none, or the rank's last line."""
    for other in (rank, *range(ranks)):
        lines = [line for line in _tail(_log(folder, other)).splitlines() if line.startswith("error: ")]
        if errors := [line for line in lines if "another rank is gone" not in line]:
            return errors[-1].removeprefix("error: ")
    return next((line.strip() for line in reversed(_tail(_log(folder, rank)).splitlines()) if line.strip()), "")


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
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"warning: process {process.pid} cannot be killed: the kernel waits for a device", file=sys.stderr)


class _Stops:
    """Passes the first stop signal on to the ranks, which save and exit; a second Ctrl-C ends them at once."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.name: str | None = None

    def take(self, number: int, frame: FrameType | None) -> None:
        """A handler for `taking_stops`."""
        if self.name is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.name = signal.Signals(number).name
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def run_stage(
    stage: str,
    config_path: Path,
    ranks: int,
    log_folder: Path,
    lock: int | None = None,
    worker: str = "lbr_dist.launch.worker",
) -> None:
    """Run one stage on `ranks` processes. Each prints to a log file, the first one to our terminal too.

    Args:
        stage: what the worker runs; its first argument.
        config_path: the resolved config.
        ranks: how many processes.
        log_folder: for the ranks' logs, `rank-N.log`.
        lock: the open file of the run's lock, which the ranks then hold too.
        worker: the module that each process runs.

    Raises:
        LaunchError: a rank died or hung; the others have been stopped, and the message shows its last lines.
        Interrupted: this process or a rank was asked to stop, and all ranks have stopped.
    """
    make_private(log_folder.parent)
    log_folder.mkdir(exist_ok=True)
    threads = omp_threads() or max(1, len(os.sched_getaffinity(0)) // ranks)
    common = os.environ | allocator()
    if lock is not None:
        common |= {HELD: str(config_path.parent.absolute())}
    processes: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    first = FirstOutput(_log(log_folder, 0))
    stops = _Stops(processes)
    with tempfile.TemporaryDirectory(prefix="lbr-") as folder, taking_stops(stops.take):
        try:
            for rank in range(ranks):
                environment = common | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "LBR_RENDEZVOUS": f"file://{folder}/rendezvous",
                    "OMP_NUM_THREADS": str(threads),
                }
                held: tuple[int, ...] = () if lock is None else (lock,)
                if rank == 0:
                    environment |= first.environment
                    held += first.pass_fds
                    streams = first.streams
                else:
                    logs.append(_log(log_folder, rank).open("wb"))
                    streams = {"stdout": logs[-1], "stderr": subprocess.STDOUT}
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", worker, stage, str(config_path)],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        pass_fds=held,
                        preexec_fn=_die_with_parent,
                        **streams,
                    )
                )
            first.start()
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
            failed = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
            if failed:
                time.sleep(0.5)  # other ranks may still report the same fault
                failed |= {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
                if any(code < 0 or code == EXIT_HUNG for code in failed.values()) and stops.name is None:
                    _ask_for_stacks(processes)
        finally:
            _stop(processes)
            first.close()
            for file in logs:
                file.close()
    if not failed:
        return
    if stops.name is not None or EXIT_INTERRUPTED in failed.values():
        message = f"{stage}: all ranks have stopped{f' after {stops.name}' if stops.name else ''}"
        raise Interrupted(message, _last_words(log_folder, 0, 1) or message)
    # a rank that was killed or hung is the cause of the other ranks' failures
    rank, code = min(failed.items(), key=lambda item: (item[1] > 0, item[1] != EXIT_HUNG, item[0]))
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if code == EXIT_HUNG:
        how = "made no progress and exited"
    stacks = f"stacks are in {log_folder}/rank-*.stacks; " if code < 0 or code == EXIT_HUNG else ""
    log = _log(log_folder, rank)
    where, tail = ("its message is above", "") if rank == 0 else (f"the end of {log}:\n", _tail(log))
    words = _last_words(log_folder, rank, ranks) if code > 0 else ""
    raise LaunchError(
        f"{stage}: rank {rank} {how}; all ranks were stopped; {stacks}{where}{tail}",
        reason=words or f"rank {rank} {how}",
    )


def _ask_for_stacks(processes: list[subprocess.Popen[bytes]]) -> None:
    living = [process for process in processes if process.poll() is None]
    for process in living:
        process.send_signal(STACKS_SIGNAL)
        process.send_signal(signal.SIGCONT)  # a suspended process hangs too
    if living:
        time.sleep(1.0)
