"""Processes that join a group, under the environments of srun and mpirun."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lbr_dist
from lbr_dist.errors import LaunchError
from lbr_dist.ranks.group import device_of
from lbr_dist.ranks.rendezvous import PORTS, Placement
from tests.unit.ranks.environments import OPENMPI, STEP

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
    while True:  # not one of the ephemeral ports
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


def test_a_rank_takes_the_gpu_of_its_local_rank() -> None:
    assert device_of(Placement(5, 8, 1, 4, "env://", "torchrun"), 4) == torch.device("cuda", 1)
    assert device_of(Placement(5, 8, 1, 4, "env://", "torchrun"), 0) == torch.device("cpu")


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if each task sees a GPU of its own: no rank could find the one of its local rank."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    says = r"rank 5 on .*: sees 1 GPU \(CUDA_VISIBLE_DEVICES=3\), but srun started 4 ranks on this node.*gpus-per-node"
    for local_rank in (0, 1):
        with pytest.raises(LaunchError, match=says):
            device_of(Placement(5, 8, local_rank, 4, "env://", "srun"), 1)


@pytest.mark.gpu
def test_ranks_without_a_gpu_are_refused_by_real_ranks() -> None:
    count = torch.cuda.device_count()
    url = {"LBR_RENDEZVOUS": "tcp://127.0.0.1:1", "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
    size = {"WORLD_SIZE": str(count + 1), "LOCAL_WORLD_SIZE": str(count + 1)}
    ((code, _, error),) = start(url | size | {"RANK": str(count), "LOCAL_RANK": str(count)})
    assert code == 1 and f"sees {count} GPU" in error and f"lbr started {count + 1} ranks on this node" in error, error
