"""Who started this process, as which rank of how many: real launchers' environments, and real processes that meet."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lbr_dist
from lbr_dist.errors import LaunchError
from lbr_dist.ranks.peers import Peer, misplaced
from lbr_dist.ranks.rendezvous import PORTS, Placement, first_host, launcher_of, placement

BATCH = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n1",
}
STEP = BATCH | {
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURMD_NODENAME": "n2",
}
LBR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LBR_RENDEZVOUS": "file:///x/y"}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
BY_HAND = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"} | MASTER
TORCHRUN = BY_HAND | {
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "ROLE_RANK": "5",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "9", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0", "HOME": "/"}, None),
        ({"LBR_RENDEZVOUS": "tcp://n1:1"}, None),
        (BATCH, None),
        (BATCH | MASTER, None),
        (LBR, "lbr"),
        (TORCHRUN, "torchrun"),
        (DEEPSPEED | MASTER, "deepspeed"),
        (BY_HAND, "environment"),
        (STEP, "srun"),
        (STEP | {"PMI_SIZE": "3", "PMI_RANK": "2"}, "srun"),  # srun --mpi=pmi2
        (OPENMPI, "mpirun"),
        (HYDRA, "mpirun"),
        # the inner one counts
        (STEP | TORCHRUN, "torchrun"),
        (STEP | LBR, "lbr"),
        (OPENMPI | TORCHRUN, "torchrun"),
        (OPENMPI | LBR, "lbr"),
        (STEP | OPENMPI, "mpirun"),
        (STEP | HYDRA, "mpirun"),
        (STEP | DEEPSPEED | MASTER, "deepspeed"),
        # srun --pty bash, and srun inside it
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "38253"}, None),
        (STEP | {"SLURM_PTY_PORT": "38253"}, "srun"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1", "LBR_RENDEZVOUS": "tcp://n1:1"}, "srun"),
    ],
)
def test_the_innermost_launcher_is_found(environment: dict[str, str], expected: str | None) -> None:
    assert launcher_of(environment) == expected


def test_the_names_of_torchrun_and_its_like() -> None:
    assert placement(LBR) == Placement(1, 2, 1, 2, "file:///x/y", "lbr")
    assert placement(TORCHRUN) == Placement(5, 8, 1, 4, "env://", "torchrun")
    assert placement(STEP | TORCHRUN) == Placement(5, 8, 1, 4, "env://", "torchrun")
    assert placement(DEEPSPEED | MASTER) == Placement(3, 4, 1, 2, "env://", "deepspeed")
    assert placement(BY_HAND) == Placement(5, 8, 1, 4, "env://", "environment")
    assert placement({"RANK": "0", "WORLD_SIZE": "1"}) == Placement(0, 1, 0, 1, None, "environment")
    two = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MASTER
    assert placement(two) == Placement(1, 2, 1, 2, "env://", "environment")


def test_a_slurm_step() -> None:
    found = placement(STEP)
    assert found is not None and found.url is not None
    assert found == Placement(2, 3, 0, 1, found.url, "srun")
    host, port = found.url.removeprefix("tcp://").split(":")
    assert host == "n1" and int(port) in PORTS
    others = (
        {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"},
        {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"},
    )
    places = [placement(STEP | more) for more in others]
    assert places == [Placement(0, 3, 0, 2, found.url, "srun"), Placement(1, 3, 1, 2, found.url, "srun")]
    steps = [{}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "42"}, {"SLURM_RESTART_COUNT": "1"}]
    urls = {place.url for more in steps if (place := placement(STEP | more)) is not None}
    assert len(urls) == len(steps)

    def url(more: dict[str, str]) -> str | None:
        place = placement(STEP | more)
        return place.url if place is not None else None

    assert url({"MASTER_PORT": "7"}) == "tcp://n1:7"
    assert url(MASTER | {"MASTER_ADDR": "n1-ib"}) == "tcp://n1-ib:29500"
    assert url({"LBR_RENDEZVOUS": "tcp://n1:4444"} | MASTER) == "tcp://n1:4444"
    assert url({"RANK": "2", "WORLD_SIZE": "3"}) == found.url  # exported by the user, and right
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert placement(STEP | alone) == Placement(0, 1, 0, 1, None, "srun")
    many = {"SLURM_STEP_NUM_TASKS": "21", "SLURM_STEP_TASKS_PER_NODE": "8(x2),2,1(x3)", "SLURM_PROCID": "17"}
    found = placement(STEP | many | {"SLURM_NODEID": "2", "SLURM_LOCALID": "1"})
    assert found is not None and (found.world_size, found.local_world_size) == (21, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2,7],gpu03", "n1"),
        ("gpu03,n[1-2]", "gpu03"),
        ("n[08-10]", "n08"),
        ("n[7,9-12]", "n7"),
        ("a-b[003,5]-ib,x", "a-b003-ib"),
        ("rack[2-3]n[04-05]", "rack2n04"),
        ("node.x[1-2].y,z", "node.x1.y"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (STEP | {"RANK": "0", "WORLD_SIZE": "3"}, "RANK: found 0 in the environment, but srun .* as rank 2 of 3"),
        (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE: found 8 in the environment, but srun .* as rank 2 of 3"),
        (STEP | {"SLURM_PROCID": "3"}, "srun's environment: found rank 3 of world size 3, expected one of 0 to 2"),
        (STEP | {"SLURM_LOCALID": "1"}, "found local rank 1 of local world size 1"),
        (STEP | {"SLURM_PROCID": "two"}, "SLURM_PROCID: found 'two' in the environment, expected a whole number"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "SLURM_STEP_TASKS_PER_NODE: found 2 on node 1, expected 3 tasks"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,x"}, "SLURM_STEP_TASKS_PER_NODE: found '2,x'"),
        (STEP | {"SLURM_PROCID": "0"}, "found rank 0 on node 1 of the step, expected it on the first one"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: not in the environment"),
        (STEP | {"MASTER_PORT": "x"}, "MASTER_PORT: found 'x'"),
        (LBR | {"RANK": "2"}, "lbr's environment: found rank 2 of world size 2"),
        (LBR | {"RANK": "-1"}, "RANK: found '-1'"),
        (LBR | {"WORLD_SIZE": "0"}, "found rank 1 of world size 0, expected a world size of one or more"),
        (LBR | {"LOCAL_WORLD_SIZE": "3"}, "found 3 ranks on this node, 2 in all"),
        ({"RANK": "0"}, "WORLD_SIZE: not in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR: not in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"} | MASTER, "LOCAL_RANK: not in the environment"),
        (DEEPSPEED, "MASTER_ADDR: not in the environment"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, "LOCAL_WORLD_SIZE: not in the environment"),
    ],
)
def test_what_does_not_fit_together_is_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        placement(environment)


def test_a_batch_script_that_inherits_a_step(tmp_path: Path) -> None:
    """As Slurm does: the task's parent, slurmstepd, names the step in its title."""
    for title, expected in (("slurmstepd: [41.batch]", None), ("slurmstepd: [41.0]", "srun")):
        command = ["bash", "-c", 'exec -a "$0" bash -c "sleep 60 & echo \\$!; wait"', title]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert parent.stdout is not None
        try:
            assert launcher_of(STEP | {"SLURM_TASK_PID": parent.stdout.readline().strip()}) == expected
        finally:
            os.killpg(parent.pid, 9)
            parent.communicate()


# ---- ranks that have met ------------------------------------------------------------------------------------------


def peers(*places: tuple[str, int, int], world: int | None = None) -> list[Peer]:
    size = world or len(places)
    return [
        Peer(Placement(rank, max(size, rank + 1), local, of, None, "srun"), (node, "boot"), frozenset({0, 1}))
        for rank, (node, local, of) in enumerate(places)
    ]


def test_ranks_are_numbered_node_by_node() -> None:
    assert misplaced(peers(("a", 0, 1))) is None
    assert misplaced(peers(("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2))) is None
    assert misplaced(peers(("b", 0, 2), ("b", 1, 2), ("a", 0, 1))) is None
    cyclic = peers(("a", 0, 2), ("b", 0, 2), ("a", 1, 2), ("b", 1, 2))
    assert misplaced(cyclic) == (
        "rank 2 on a: found ranks of other nodes between those of this one, expected its 2 in a row"
    )
    assert "expected its 3 in a row" in str(misplaced(peers(("a", 0, 3), ("b", 0, 1), ("a", 1, 3), ("a", 2, 3))))
    assert misplaced(peers(("a", 0, 2), ("a", 0, 2))) == (
        "rank 1 on a: found local rank 0 of 2, expected 1 of the 2 ranks there"
    )
    assert misplaced(peers(("a", 0, 1), ("a", 1, 2))) == (
        "rank 0 on a: found local rank 0 of 1, expected 0 of the 2 ranks there"
    )
    assert misplaced(peers(("a", 0, 2), ("a", 1, 2), world=3)) == ("rank 0 on a: found a world of 3 ranks, expected 2")
    same_name = peers(("localhost", 0, 1), ("localhost", 0, 1))
    assert misplaced([same_name[0], replace(same_name[1], node=("localhost", "another boot"))]) is None


def test_cores_are_shared_by_those_who_may_use_them() -> None:
    a, b, c = peers(("a", 0, 2), ("a", 1, 2), ("b", 0, 1))
    assert [each.share_of_cores([a, b, c]) for each in (a, b, c)] == [1, 1, 2]
    a, b = replace(a, cores=frozenset(range(8))), replace(b, cores=frozenset(range(8, 16)))
    assert [each.share_of_cores([a, b]) for each in (a, b)] == [8, 8]  # srun --cpus-per-task=8
    a, b = replace(a, cores=frozenset({0})), replace(b, cores=frozenset({0}))
    assert [each.share_of_cores([a, b]) for each in (a, b)] == [1, 1]


JOIN = """
import sys
from lbr_dist.ranks import group
from lbr_dist.errors import LaunchError
try:
    ranks = group.start(1)
except LaunchError as error:
    sys.exit(f"LaunchError: {error}")
print(ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.traffic.counts)
print(group.from_all(ranks.rank, ranks), group.from_first(ranks.rank, ranks))
group.stop()
"""


def start(*environments: dict[str, str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of processes that join with these environments."""
    base = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=base | {"PYTHONPATH": str(Path(lbr_dist.__file__).parents[1])} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in environments
    ]
    results = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, *result) for process, result in zip(started, results, strict=True)]


def free_port() -> int:
    while True:  # none of those that the system gives away by itself
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def step(rank: int, node: str, local: int, counts: str, port: int) -> dict[str, str]:
    number = {"a": "0", "b": "1"}[node]
    more = {"SLURM_PROCID": str(rank), "SLURM_NODEID": number, "SLURM_LOCALID": str(local), "SLURMD_NODENAME": node}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return STEP | more | where | {"SLURM_STEP_TASKS_PER_NODE": counts}


def test_tasks_of_a_step_meet_on_nodes_of_unequal_size() -> None:
    port = free_port()
    found = start(step(0, "a", 0, "2,1", port), step(1, "a", 1, "2,1", port), step(2, "b", 0, "2,1", port))
    assert [(code, out) for code, out, _ in found] == [
        (0, f"{rank} 3 {local} 2 {{}}\n[0, 1, 2] 0\n") for rank, local in ((0, 0), (1, 1), (2, 0))
    ], found


def test_tasks_that_are_not_numbered_node_by_node_are_refused_on_every_rank() -> None:
    """What `srun --distribution=cyclic` gives."""
    port = free_port()
    found = start(step(0, "a", 0, "2,1", port), step(1, "b", 0, "2,1", port), step(2, "a", 1, "2,1", port))
    for code, _, error in found:
        assert code == 1 and "LaunchError: rank 2 on a: found ranks of other nodes between" in error, error
        assert "no --distribution=cyclic" in error


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        ((code, _, error),) = start(step(0, "a", 0, "2,1", port))
    assert code == 1
    expected = f"LaunchError: rank 0: the port of tcp://127.0.0.1:{port} is taken by another process on this node."
    assert expected in error, error


def test_mpirun_without_mpi4py_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError('mpi4py')")
    path = os.pathsep.join((str(tmp_path), str(Path(lbr_dist.__file__).parents[1])))
    ((code, _, error),) = start(OPENMPI | {"PYTHONPATH": path})
    assert code == 1 and "the package mpi4py is not installed" in error and "pip install 'lbr-dist[mpi]'" in error
