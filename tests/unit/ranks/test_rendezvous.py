"""The launcher, rank and world size of a process, from the environments that real launchers set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lbr_dist.errors import LaunchError
from lbr_dist.ranks import rendezvous
from lbr_dist.ranks.rendezvous import PORTS, Placement, first_host, launcher_of, placement, started_as
from tests.unit.ranks.environments import BATCH, BY_HAND, DEEPSPEED, HYDRA, LBR, MASTER, OPENMPI, STEP, TORCHRUN


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
        # the inner launcher counts
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


def test_torchrun_and_launchers_with_its_variables() -> None:
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
    assert url({"RANK": "2", "WORLD_SIZE": "3"}) == found.url  # exported by the user, and correct
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
        (STEP | {"SLURM_PROCID": "0"}, "found rank 0 on node 1 of the step, expected it on the first node"),
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
def test_contradictory_variables_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        placement(environment)


ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | MASTER
"""What Kubeflow's operator sets in a job of one pod."""

ONE_TASK = STEP | {
    **{"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
}


@pytest.mark.parametrize(
    ("environment", "wanted", "starts"),
    [
        ({}, 2, True),
        (ONE, 2, True),
        (ONE, 1, False),
        (ONE, None, False),
        (ONE_TASK, 2, True),
        (ONE_TASK, None, False),
        (BY_HAND, 8, False),
        (BY_HAND, 4, False),  # on each node
        (BY_HAND, None, False),
        (TORCHRUN, 3, False),
        (LBR, 3, False),
    ],
)
def test_who_starts_the_ranks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: int | None, starts: bool
) -> None:
    monkeypatch.setattr(rendezvous, "here", lambda: placement(environment))
    place = started_as(wanted)
    assert place == (None if starts else placement(environment))


def test_another_number_of_ranks_than_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "here", lambda: placement(BY_HAND))
    with pytest.raises(LaunchError, match=r"--ranks: found 2, but RANK=5 and WORLD_SIZE=8 .* unset RANK"):
        started_as(2)


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
