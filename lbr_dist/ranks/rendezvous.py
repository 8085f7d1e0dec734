"""This process's rank, the world size, and where the ranks meet: read once, from whichever launcher started it.

The innermost launcher counts: torchrun inside srun or mpirun, `lbr` inside any of them. A process that no launcher
started is alone. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbr_dist.errors import LaunchError

Launcher = Literal["lbr", "torchrun", "deepspeed", "mpirun", "srun", "environment"]
Environment = Mapping[str, str]

PORTS = range(20000, 32000)
"""The ports for Slurm steps: below the ephemeral ports that systems hand out."""


@dataclass(frozen=True, slots=True)
class Placement:
    """This process among the ranks of its launcher.

    Raises:
        LaunchError: the rank does not fit the world size, or the local rank the local world size.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    url: str | None
    """The rendezvous URL for `init_process_group`; None if there is no other rank."""

    launcher: Launcher

    def __post_init__(self) -> None:
        for name, number, of, size in (
            ("rank", self.rank, "world size", self.world_size),
            ("local rank", self.local_rank, "local world size", self.local_world_size),
        ):
            if not 0 <= number < size:
                expected = f"one of 0 to {size - 1}" if size > 0 else f"a {of} of one or more"
                raise self._wrong(f"{name} {number} of {of} {size}", expected)
        if self.local_world_size > self.world_size:
            found = f"{self.local_world_size} ranks on this node, {self.world_size} in all"
            raise self._wrong(found, f"at most {self.world_size} on a node")

    def _wrong(self, found: str, expected: str) -> LaunchError:
        return LaunchError(
            f"{self.launcher}'s environment: found {found}, expected {expected}. Start all ranks with one launcher, "
            "and do not set its variables yourself."
        )


@functools.cache
def here() -> Placement | None:
    """The placement of this process, determined once: under mpirun all ranks take part. Raises as `placement` does."""
    return placement()


def started_as(wanted: int | None) -> Placement | None:
    """The placement of a process that may start ranks itself; None if it should start them.

    A lone process of srun, or of a launcher that sets `RANK=0` and `WORLD_SIZE=1` (Kubeflow's for a job of one pod),
    may have the whole node, so it starts as many ranks as the user asks for.

    Args:
        wanted: how many ranks the user asks for. Ignored under launchers that start every rank themselves.

    Raises:
        LaunchError: `RANK` and `WORLD_SIZE` say that there are other ranks, and another number is asked for.
    """
    place = here()
    if place is None or wanted is None or place.launcher not in ("srun", "environment"):
        return place
    if place.world_size == 1:
        return None if wanted > 1 else place
    if place.launcher == "environment" and wanted not in (place.world_size, place.local_world_size):
        raise LaunchError(
            f"--ranks: found {wanted}, but RANK={place.rank} and WORLD_SIZE={place.world_size} in the environment say "
            f"that this process is one of {place.world_size} ranks that a launcher started. Leave out --ranks "
            f"(cluster.ranks), or unset RANK and WORLD_SIZE to start {wanted} ranks on this machine."
        )
    return place


def placement(environment: Environment = os.environ) -> Placement | None:
    """The placement of a process with this environment; None if it is alone.

    Raises:
        LaunchError: a variable is missing, is not a number, or contradicts the launcher; or mpi4py cannot be used.
    """
    launcher = launcher_of(environment)
    if launcher is None:
        return None
    if launcher == "mpirun":
        place = _from_mpi(environment)
    elif launcher == "srun":
        place = _from_srun(environment)
    else:
        return _from_names(environment, launcher)
    for name, number in (("RANK", place.rank), ("WORLD_SIZE", place.world_size)):
        if name in environment and _number(environment, name) != number:
            raise LaunchError(
                f"{name}: found {environment[name]} in the environment, but {launcher} started this process as rank "
                f"{place.rank} of {place.world_size}. Unset {name}: it is left over from another launch."
            )
    return place


def launcher_of(environment: Environment) -> Launcher | None:
    """The launcher that started a process with this environment as one of its ranks; None if there is none."""
    if "RANK" in environment:
        if "LBR_RENDEZVOUS" in environment:
            return "lbr"
        if "TORCHELASTIC_RUN_ID" in environment or "GROUP_RANK" in environment:
            return "torchrun"
        if "CROSS_RANK" in environment and "LOCAL_SIZE" in environment:
            return "deepspeed"
    # Open MPI's orted is itself a task of a Slurm step, and its ranks inherit the step's variables; so are the proxies
    # of MPICH and Intel MPI, whose ranks have MPI_LOCALNRANKS. PMI_SIZE alone may also come from srun
    step = "SLURM_STEP_NUM_TASKS" in environment
    hydra = "PMI_SIZE" in environment and (not step or "MPI_LOCALNRANKS" in environment)
    if "OMPI_COMM_WORLD_SIZE" in environment or hydra:
        return "mpirun"
    if step and not _is_shell(environment) and not _is_batch_script(environment):
        return "srun"
    return "environment" if "RANK" in environment else None


def _is_shell(environment: Environment) -> bool:
    """Inside `srun --pty bash`: a step of one task, whose commands are not ranks."""
    alone = environment["SLURM_STEP_NUM_TASKS"] == "1" and "SLURM_PTY_PORT" in environment
    return alone and "LBR_RENDEZVOUS" not in environment


def _is_batch_script(environment: Environment) -> bool:
    """A batch script submitted from inside a step inherits the step's variables; its parent shows which it is."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{environment.get('SLURM_TASK_PID')}/stat").read_text(encoding="utf-8", errors="replace")
        parent = status.rpartition(")")[2].split()[1]
        # the parent's title is `slurmstepd: [123.batch]` for a script, `slurmstepd: [123.0]` for a step
        return b".batch]" in Path(f"/proc/{parent}/cmdline").read_bytes()
    return False


# ---- each launcher ------------------------------------------------------------------------------------------------


def _from_names(environment: Environment, launcher: Launcher) -> Placement:
    """From torchrun's variables, which other launchers set too."""
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    alone = size == 1 and launcher == "environment"
    local_rank = 0 if alone and "LOCAL_RANK" not in environment else _number(environment, "LOCAL_RANK")
    local_name = "LOCAL_SIZE" if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    # users who set the variables for one node often omit it; ranks of several nodes notice when they meet
    missing = launcher == "environment" and local_name not in environment
    local_size = size if missing else _number(environment, local_name)
    if launcher == "lbr":
        url: str | None = environment["LBR_RENDEZVOUS"]
    elif alone and "MASTER_ADDR" not in environment:
        url = None
    else:
        url = "env://"
        _given(environment, "MASTER_ADDR")
        _number(environment, "MASTER_PORT")
    return Placement(rank, size, local_rank, local_size, url, launcher)


def _from_mpi(environment: Environment) -> Placement:
    """Through MPI, which is finalized at once: only the meeting needs it.

    A process that has finalized MPI can exit at any time, and mpirun stops the others if one exits with an error. A
    process that has not would wait in MPI's own exit for all the others, error or not.
    """
    ours = "mpi4py.MPI" not in sys.modules
    try:
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise LaunchError(
            "mpirun: the package mpi4py is not installed; mpirun's ranks need it to meet. Install it with "
            "`pip install 'lbr-dist[mpi]'`, or start the ranks with torchrun or srun."
        ) from None
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpirun: mpi4py cannot load its MPI library ({error}). Install it again with this machine's MPI: "
            "`pip install --force-reinstall --no-binary mpi4py mpi4py`."
        ) from None
    world = MPI.COMM_WORLD
    size, rank = world.Get_size(), world.Get_rank()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_size, local_rank = node.Get_size(), node.Get_rank()
    node.Free()
    url = world.bcast(_free_address(environment, local_size == size) if rank == 0 else None)
    if ours:
        MPI.Finalize()
    name = "OMPI_COMM_WORLD_SIZE" if "OMPI_COMM_WORLD_SIZE" in environment else "PMI_SIZE"
    if (expected := _number(environment, name)) != size:
        raise LaunchError(
            f"mpirun: found {size} ranks through mpi4py, expected {expected} ({name}): mpi4py was built for another "
            "MPI than this mpirun's. Install it again with this one: "
            "`pip install --force-reinstall --no-binary mpi4py mpi4py`."
        )
    return Placement(rank, size, local_rank, local_size, url if size > 1 else None, "mpirun")


def _free_address(environment: Environment, one_node: bool) -> str:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    return f"tcp://{'127.0.0.1' if one_node else node_name(environment)}:{port}"


def _from_srun(environment: Environment) -> Placement:
    rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    local_rank, node = _number(environment, "SLURM_LOCALID"), _number(environment, "SLURM_NODEID")
    counts = _task_counts(_given(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(counts) or sum(counts) != size:
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE: found {environment['SLURM_STEP_TASKS_PER_NODE']} on node {node}, expected "
            f"{size} tasks in all (SLURM_STEP_NUM_TASKS). Start the ranks with srun itself."
        )
    url = None
    if size > 1:
        url = environment.get("LBR_RENDEZVOUS") or _step_address(environment)
        if rank == 0 and node != 0:
            raise LaunchError(
                f"srun: found rank 0 on node {node} of the step, expected it on the first node, where the ranks meet. "
                "Use srun's own order: no --distribution=arbitrary."
            )
    return Placement(rank, size, local_rank, counts[node], url, "srun")


def _step_address(environment: Environment) -> str:
    """An address that every task of a step computes by itself, without asking Slurm."""
    host = environment.get("MASTER_ADDR") or first_host(_given(environment, "SLURM_STEP_NODELIST"))
    if "MASTER_PORT" in environment:
        return f"tcp://{host}:{_number(environment, 'MASTER_PORT')}"
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    step = ".".join([*(_given(environment, name) for name in names), environment.get("SLURM_RESTART_COUNT", "0")])
    number = int.from_bytes(hashlib.sha256(step.encode()).digest()[:8], "big")
    return f"tcp://{host}:{PORTS[number % len(PORTS)]}"


def first_host(nodes: str) -> str:
    """The first node of a list from Slurm: ``n01`` for ``n[01-03,07],gpu5``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise LaunchError(f"SLURM_STEP_NODELIST: found {nodes!r}, expected node names. Start the ranks with srun.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _task_counts(text: str) -> list[int]:
    """Tasks on each node: 2, 2, 1 for ``2(x2),1``."""
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if found is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE: found {text!r}, expected a list like '2(x3),1'.")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


# ---- variables ----------------------------------------------------------------------------------------------------


def node_name(environment: Environment = os.environ) -> str:
    """The node's name for messages and addresses: Slurm's, if it has one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _given(environment: Environment, name: str) -> str:
    if not environment.get(name):
        raise LaunchError(
            f"{name}: not in the environment of this rank, expected its launcher to set it. Start all ranks with one "
            "launcher: lbr, torchrun, srun, mpirun or deepspeed."
        )
    return environment[name]


def _number(environment: Environment, name: str) -> int:
    value = _given(environment, name)
    if not re.fullmatch(r"[0-9]+", value):
        raise LaunchError(
            f"{name}: found {value!r} in the environment, expected a whole number. Unset it; the launcher sets it."
        )
    return int(value)
