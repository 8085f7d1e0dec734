"""Whether a node can run ranks: its run folder, GPUs, packages, and the first node's name. Imports no torch.

A job runs `lbr doctor --node --json` on each of its nodes before its ranks start, to exclude broken ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from lbr_dist.console import size_text
from lbr_dist.launch.doctor.findings import HANGS_SECONDS, Finding, ask, fault, ok, warning, within
from lbr_dist.ranks.hardware import count_gpus, memory
from lbr_dist.ranks.rendezvous import node_name

LOW_BYTES = 2**30
"""Less free memory or disk than this gives a warning."""

SHARED_BYTES = 64 * 2**20
"""What NCCL wants free in /dev/shm; a container often has no more than this."""

PACKAGES = ("torch", "deepspeed", "transformers")
LEAVE_OUT = "exclude this node (sbatch --exclude), and tell its administrators"


def check_node(run_dir: Path | None, gpus: int | None, min_free_bytes: int = 0) -> list[Finding]:
    """Check this node in well under a second; it takes longer if something hangs.

    Args:
        run_dir: the run folder, which must exist; None if there is none yet.
        gpus: how many GPUs a job wants on this node; None or 0 for none.
        min_free_bytes: free space that the run folder must have.

    Returns:
        A finding for each check. Raises nothing.
    """
    findings = within("packages", check_packages)
    if run_dir is not None:
        findings += within("run folder", lambda: [_run_folder(run_dir, min_free_bytes)])
    findings += within("temporary folder", lambda: [check_temporary()])
    findings += within("memory", lambda: [check_memory()])
    if gpus:
        findings += within("GPUs", lambda: [check_gpus(gpus)])
        findings += check_driver(gpus)
        findings += within("/dev/shm", lambda: [check_shared()])
    return findings + within("first node", _first_node)


def check_packages() -> list[Finding]:
    """Check that the packages a rank imports first are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return [ok("packages", f"{', '.join(PACKAGES)} are installed")]
    advice = f"Run `pip install {' '.join(missing)}`, or mount the environment that the job was submitted from."
    return [fault("packages", f"{', '.join(missing)} cannot be imported", advice)]


# ---- folders -------------------------------------------------------------------------------------------------------


def write_and_read(folder: Path) -> None:
    """Write a small file, read it, and delete it.

    Raises:
        OSError: it cannot be written, or reads back differently.
    """
    path, content = folder / f".lbr-doctor-{node_name()}-{os.getpid()}", os.urandom(1 << 16)
    try:
        with path.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if path.read_bytes() != content:
            raise OSError(None, "what was read back is not what was written", str(path))
        path.unlink()
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def check_room(name: str, folder: Path, min_free_bytes: int) -> Finding:
    """Check that a folder can be written and has free space."""
    try:
        write_and_read(folder)
    except OSError as error:
        advice = "Make room, mount it writable, or change its permissions; or name another folder."
        return fault(name, f"{folder} cannot be written: {error.strerror}", advice)
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {size_text(free)} free, can be written and read"
    if free < min_free_bytes:
        advice = f"Make room: {size_text(min_free_bytes)} are required (--min-free-gb). Or name another folder."
        return fault(name, found, advice)
    if free < LOW_BYTES:
        return warning(name, found, f"Make room: below {size_text(LOW_BYTES)}, a checkpoint will soon fail.")
    return ok(name, found)


def _run_folder(folder: Path, min_free_bytes: int) -> Finding:
    if not folder.is_dir():
        found = f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        return fault("run folder", found, f"Name a folder that all nodes share. If other nodes see it, {LEAVE_OUT}.")
    return check_room("run folder", folder, min_free_bytes)


def check_temporary() -> Finding:
    """Check that temporary files can be written."""
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # none of the usual folders can be written
        return fault("temporary folder", str(error.strerror), "Set TMPDIR to a folder that can be written.")
    finding = check_room("temporary folder", folder, 0)
    if finding.state == "warning":
        return warning(finding.name, finding.found, "Make room, or set TMPDIR: compiled kernels and logs go there.")
    return finding


def check_shared() -> Finding:
    """Check the size of shared memory, through which NCCL connects the ranks of a node."""
    size = shutil.disk_usage("/dev/shm")
    found = f"{size_text(size.total)}, {size_text(size.free)} free"
    if size.free < SHARED_BYTES:
        advice = f"NCCL wants {size_text(SHARED_BYTES)} or more: start the container with --shm-size or --ipc=host."
        return warning("/dev/shm", found, advice)
    return ok("/dev/shm", found)


def check_memory() -> Finding:
    """Check the memory that is available."""
    available, total = memory()
    found = f"{size_text(available)} of {size_text(total)} available"
    if available < LOW_BYTES:
        return warning("memory", found, "A rank takes about 0.9 GiB without its model. See what else runs here.")
    return ok("memory", found)


# ---- GPUs ----------------------------------------------------------------------------------------------------------


def visible() -> str:
    """The value of CUDA_VISIBLE_DEVICES, for messages."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if devices is None else f" (CUDA_VISIBLE_DEVICES={devices!r})"


def check_gpus(wanted: int) -> Finding:
    """Check that this node has as many GPUs as are wanted."""
    there = count_gpus()
    found = f"{there} in /dev{visible()}, {wanted} wanted"
    if there < wanted:
        return fault("GPUs", found, f"Request {wanted} from Slurm (--gpus-per-node), or use fewer. Or {LEAVE_OUT}.")
    return ok("GPUs", found)


def check_driver(wanted: int) -> list[Finding]:
    """Check that the driver lists as many GPUs as are wanted, in time and without an error."""
    fields = "index,name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total"
    answer = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", seconds=HANGS_SECONDS)
    if answer.missing:
        advice = "Jobs run without nvidia-smi, but a broken GPU is not found before they start. Put it on PATH."
        return [warning("driver", str(answer.failure), advice)]
    if answer.failure is not None:
        return [fault("driver", answer.failure, f"A GPU may have fallen off the bus: {LEAVE_OUT}.")]
    rows = [[field.strip() for field in line.split(",")] for line in answer.text.splitlines() if line.strip()]
    whole = [row for row in rows if len(row) == 5 and row[0].isdigit() and re.fullmatch(r"\d+ MiB", row[2])]
    if len(whole) < max(wanted, len(rows)):
        broken = [", ".join(row) for row in rows if row not in whole]
        more = f"; and {broken[0][:120]!r}" if broken else ""
        found = f"nvidia-smi lists {len(whole)} GPUs without error, {wanted} wanted{more}"
        return [fault("driver", found, f"A GPU is lost, or was not allocated to this job: {LEAVE_OUT}.")]
    kinds = dict.fromkeys(f"{row[1]}, {row[2]}" for row in whole)
    listed = "; ".join(f"{sum(f'{r[1]}, {r[2]}' == kind for r in whole)} x {kind}" for kind in kinds)
    found = f"{', '.join(dict.fromkeys(row[3] for row in whole))}: {listed}"
    failing = [row[0] for row in whole if row[4].isdigit() and int(row[4])]
    if failing:
        advice = f"Memory errors that ECC could not correct, since the last reset: {LEAVE_OUT}."
        return [warning("driver", f"{found}; uncorrected errors on GPU {', '.join(failing)}", advice)]
    return [ok("driver", found)]


# ---- the first node ------------------------------------------------------------------------------------------------


def _first_node() -> list[Finding]:
    """Check that the name of a job's first node, where the ranks meet, resolves. No finding outside a job."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return []
    names = ask("scontrol", "show", "hostnames", listed).text.split() or ([] if "[" in listed else listed.split(","))
    if not names:
        return []
    try:
        address = socket.getaddrinfo(names[0], None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        found = f"{names[0]} does not resolve: {error.strerror}"
        return [fault("first node", found, f"Ranks meet there. Fix DNS or /etc/hosts; until then, {LEAVE_OUT}.")]
    return [ok("first node", f"{names[0]} is {address}")]
