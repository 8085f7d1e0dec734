"""The ranks: who am I, how many are we, and the few collectives that the stages call themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lbr_dist.traffic import Traffic
from lbr_dist.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1
    """Ranks on this node; ranks are numbered node by node."""

    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """What this rank exchanges with the others."""

    watchdog: Watchdog = field(default_factory=Watchdog, compare=False, repr=False)
    """Ends this process when it makes no progress; the one who starts a stage switches it on."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_minutes: float = 30.0) -> Ranks:
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
        # the watchdog comes first: it says more
        timeout = timedelta(minutes=timeout_minutes) + timedelta(minutes=1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if url is None:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(rank, world_size, local_rank, device, local_world_size, Traffic(local_world_size))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(total: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `total` items that is this rank's; parts differ by one item at most."""
    base, more = divmod(total, world_size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


def largest(values: Sequence[int], ranks: Ranks) -> list[int]:
    """The largest of every rank's values, place by place."""
    tensor = torch.tensor(list(values), dtype=torch.int64, device=ranks.device)
    _all_reduce(tensor, ranks, dist.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found


def total(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Sums over the ranks, in float64, place by place."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=ranks.device)
    _all_reduce(tensor, ranks, dist.ReduceOp.SUM)
    summed: list[float] = tensor.tolist()
    return summed


def together(values: Sequence[str], ranks: Ranks) -> list[str]:
    """Every rank's texts, in rank order. For messages: it pickles."""
    everyone: list[list[str]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(everyone, list(values))
    return [value for one in everyone for value in one]


def _all_reduce(tensor: Tensor, ranks: Ranks, op: dist.ReduceOp.RedOpType) -> None:
    ranks.traffic.add("all_reduce", tensor.numel() * tensor.element_size())
    dist.all_reduce(tensor, op)
