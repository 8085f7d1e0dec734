"""The ranks: who am I, how many are we, and the few collectives that the stages call themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_minutes: int = 30) -> Ranks:
    """Join the process group that the launcher's environment describes; a lone process is its own group.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` as torchrun sets them. The
    rendezvous is ``LBR_RENDEZVOUS`` (a URL; our own launcher's is a file) or else ``env://``. NCCL where there
    is a GPU for each local rank, gloo otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        # DeepSpeed warns, and probes for accelerators, unless it is told
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, cores // local_world_size))))
    if not dist.is_initialized():
        url = os.environ.get("LBR_RENDEZVOUS") or ("env://" if "MASTER_ADDR" in os.environ else None)
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if url is None:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(rank, world_size, local_rank, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(total: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `total` items that is this rank's; parts differ by one item at most."""
    base, more = divmod(total, world_size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


def largest(value: int, device: torch.device) -> int:
    """The largest of every rank's values."""
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the ranks, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Every rank's rows, in rank order.

    Args:
        rows: ``[counts[rank], d]``, this rank's.
        counts: rows of each rank.

    Returns:
        ``[sum(counts), d]``, the same on every rank.
    """
    most = max(counts)
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(counts) * most, rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([gathered[i * most : i * most + n] for i, n in enumerate(counts)])


def reduce_rows(gradient: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """The transpose of `gather_rows`: sum every rank's ``[sum(counts), d]`` and keep this rank's rows."""
    most = max(counts)
    parts = gradient.split(list(counts))
    padded = gradient.new_zeros(len(counts) * most, gradient.shape[1])
    for i, part in enumerate(parts):
        padded[i * most : i * most + len(part)] = part
    mine = gradient.new_empty(most, gradient.shape[1])
    dist.reduce_scatter_tensor(mine, padded)
    return mine[: counts[rank]]
