"""The process group: rank, world size, and the few collectives that the stages call themselves."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lbr_dist.errors import LaunchError
from lbr_dist.ranks import rendezvous
from lbr_dist.ranks.hardware import omp_threads
from lbr_dist.ranks.peers import Peer, misplaced
from lbr_dist.ranks.rendezvous import Placement
from lbr_dist.ranks.traffic import Traffic
from lbr_dist.ranks.watchdog import Watchdog

T = TypeVar("T")

WEEK_MINUTES = 7 * 24 * 60.0
"""The timeout for work without steps, where a rank may wait hours for the slowest one."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's rank, world size and device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1
    """Ranks on this node, or on the fullest node if nodes differ; ranks are numbered node by node."""

    cores: int = 1
    """This rank's share of the cores that it and other ranks may use."""

    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """What this rank exchanges with the others."""

    watchdog: Watchdog = field(default_factory=Watchdog, compare=False, repr=False)
    """Ends this process when it makes no progress; whoever starts a stage switches it on."""

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Ranks:
        """A process by itself, which needs no process group."""
        return cls(0, 1, 0, torch.device(device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group of this process's launcher (see `rendezvous`); a lone process is its own group.

    NCCL if this process sees GPUs, gloo otherwise. Sets the environment variables of torchrun, since other libraries
    read them.

    Raises:
        LaunchError: there are fewer GPUs than ranks on this node; or the ranks cannot meet, or are not numbered node by
            node, which is raised on every rank.
    """
    place = rendezvous.here() or Placement(0, 1, 0, 1, None, "environment")
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed reads it
    if place.world_size > 1:
        os.environ |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
        }
    device = device_of(place, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # otherwise DeepSpeed warns, and probes for accelerators
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        # a minute longer than the watchdog, whose message says more
        _join(place, "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes + 1))
    peers = _meet(place)
    cores = peers[place.rank].share_of_cores(peers)
    if device.type == "cpu":
        torch.set_num_threads(omp_threads() or cores)
    # the same number on all ranks, since they must build the same groups
    fullest = max(peer.place.local_world_size for peer in peers)
    return Ranks(place.rank, place.world_size, place.local_rank, device, fullest, cores, Traffic(fullest))


def device_of(place: Placement, gpus: int) -> torch.device:
    """A rank's device: the GPU of its local rank, or the CPU if this process sees no GPU.

    Args:
        place: the rank.
        gpus: how many GPUs this process sees.

    Raises:
        LaunchError: fewer GPUs than ranks on this node.
    """
    if not gpus:
        return torch.device("cpu")
    if gpus < place.local_world_size:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise LaunchError(
            f"rank {place.rank} on {rendezvous.node_name()}: sees {gpus} GPU{'s' if gpus > 1 else ''}{where}, but "
            f"{place.launcher} started {place.local_world_size} ranks on this node. Each rank needs its own GPU, and "
            "takes the one of its local rank: start one rank per GPU, and let each see all GPUs of its node (srun "
            "--gpus-per-node, not --gpus-per-task). To train on the CPU, set CUDA_VISIBLE_DEVICES to an empty value."
        )
    return torch.device("cuda", place.local_rank)


def _join(place: Placement, backend: str, timeout: timedelta) -> None:
    if place.url is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(
            backend, init_method=place.url, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
    except dist.DistNetworkError as error:
        where = "MASTER_ADDR and MASTER_PORT" if place.url == "env://" else place.url
        if "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0: the port of {where} is taken by another process on this node. Set MASTER_PORT to a free one "
                "for all ranks, or start again."
            ) from error
        raise LaunchError(
            f"rank {place.rank}: cannot meet the other ranks at {where} ({error}). Rank 0 must run there, and the "
            "nodes must reach each other. MASTER_ADDR and MASTER_PORT set another address."
        ) from error


def _meet(place: Placement) -> list[Peer]:
    """Every rank's `Peer`, in rank order. Raises LaunchError, on all ranks, if they are not numbered node by node."""
    me = Peer.of(place)
    if place.world_size == 1:
        return [me]
    peers: list[Peer] = [me] * place.world_size
    dist.all_gather_object(peers, me)
    wrong = misplaced(peers)
    if wrong is not None:
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # no rank leaves before all have the result
        raise LaunchError(
            f"{wrong}. Ranks must be numbered node by node, local ranks from 0 on each: with srun, give no "
            "--distribution=cyclic; with mpirun, give --map-by slot."
        )
    return peers


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(timeout_minutes: float = WEEK_MINUTES) -> Iterator[Ranks]:
    """Join the ranks for work without steps, however long it takes; a lone process needs no process group."""
    if rendezvous.here() is None:
        yield Ranks.alone("cuda" if torch.cuda.is_available() else "cpu")
        return
    try:
        yield start(timeout_minutes)
    finally:
        stop()


def share(total: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of `total` items; parts differ by at most one item."""
    base, more = divmod(total, world_size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


def largest(values: Sequence[int], ranks: Ranks) -> list[int]:
    """The element-wise maximum over the ranks."""
    tensor = torch.tensor(list(values), dtype=torch.int64, device=ranks.device)
    _all_reduce(tensor, ranks, dist.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found


def total(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The element-wise sum over the ranks, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=ranks.device)
    _all_reduce(tensor, ranks, dist.ReduceOp.SUM)
    summed: list[float] = tensor.tolist()
    return summed


def add_up(tensor: Tensor, ranks: Ranks) -> None:
    """Replace a tensor by its sum over the ranks."""
    _all_reduce(tensor, ranks, dist.ReduceOp.SUM)


def together(values: Sequence[str], ranks: Ranks) -> list[str]:
    """Every rank's strings, in rank order. It pickles, so use it for messages only."""
    return [value for of_rank in from_all(list(values), ranks) for value in of_rank]


def from_first(value: T, ranks: Ranks) -> T:
    """The first rank's value, on every rank. It pickles; a lone process needs no group."""
    held = [value]
    if ranks.world_size > 1:
        ranks.traffic.add("broadcast", len(pickle.dumps(value)), root=0)
        dist.broadcast_object_list(held, src=0, device=ranks.device)
    return held[0]


def from_all(value: T, ranks: Ranks, group: Any = None) -> list[T]:
    """Every rank's value, in rank order; waits for all ranks. It pickles; a lone process needs no group."""
    values = [value] * ranks.world_size
    if ranks.world_size > 1:
        ranks.traffic.add("all_gather_object", len(pickle.dumps(value)) * ranks.world_size, group)
        dist.all_gather_object(values, value, group=group)
    return values


def meet(ranks: Ranks) -> None:
    """Wait for all ranks; a lone process needs no group."""
    if ranks.world_size > 1:
        ranks.traffic.add("barrier", 0)
        dist.barrier()


def _all_reduce(tensor: Tensor, ranks: Ranks, op: dist.ReduceOp.RedOpType) -> None:
    ranks.traffic.add("all_reduce", tensor.numel() * tensor.element_size())
    dist.all_reduce(tensor, op)
