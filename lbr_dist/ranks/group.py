"""The ranks: who am I, how many are we, and the few collectives that the stages call themselves."""

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
from lbr_dist.ranks.peers import Peer, misplaced
from lbr_dist.ranks.rendezvous import Placement
from lbr_dist.ranks.traffic import Traffic
from lbr_dist.ranks.watchdog import Watchdog

T = TypeVar("T")

WEEK_MINUTES = 7 * 24 * 60.0
"""For work without steps, where a rank may wait hours for the slowest one."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1
    """Ranks on this node, or on the fullest one where they differ; ranks are numbered node by node."""

    cores: int = 1
    """Of the cores that this process may use, its share among the ranks that may use them too."""

    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """What this rank exchanges with the others."""

    watchdog: Watchdog = field(default_factory=Watchdog, compare=False, repr=False)
    """Ends this process when it makes no progress; the one who starts a stage switches it on."""

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Ranks:
        """A process by itself, which needs no process group."""
        return cls(0, 1, 0, torch.device(device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group of this process's launcher (see `rendezvous`); a lone process is its own group.

    NCCL where there is a GPU for each local rank, gloo otherwise. The names that torchrun has made common are set for
    the libraries that read them.

    Raises:
        LaunchError: the ranks cannot meet, or are not numbered node by node: on every rank alike.
    """
    place = rendezvous.here() or Placement(0, 1, 0, 1, None, "environment")
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed reads it
    if place.world_size > 1:
        os.environ |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
        }
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        # DeepSpeed warns, and probes for accelerators, unless it is told
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
    if not dist.is_initialized():
        # the watchdog comes first: it says more
        _join(place, "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes + 1))
    peers = _meet(place)
    cores = peers[place.rank].share_of_cores(peers)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores)))
    fullest = max(peer.place.local_world_size for peer in peers)  # one number for all: they must build alike groups
    return Ranks(place.rank, place.world_size, place.local_rank, device, fullest, cores, Traffic(fullest))


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
            f"rank {place.rank}: cannot meet the others at {where} ({error}). Rank 0 must run there, and nodes must "
            "reach each other; MASTER_ADDR and MASTER_PORT name another place."
        ) from error


def _meet(place: Placement) -> list[Peer]:
    """What every rank tells, in their order. Raises LaunchError, on all ranks, where the order is not that of nodes."""
    me = Peer.of(place)
    if place.world_size == 1:
        return [me]
    peers: list[Peer] = [me] * place.world_size
    dist.all_gather_object(peers, me)
    wrong = misplaced(peers)
    if wrong is not None:
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # nobody leaves before all know
        raise LaunchError(
            f"{wrong}. Ranks must be numbered node by node, local ranks from 0 on each: with srun, no "
            "--distribution=cyclic; with mpirun, --map-by slot."
        )
    return peers


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(timeout_minutes: float = WEEK_MINUTES) -> Iterator[Ranks]:
    """This process's place in work without steps, for as long as that takes; a lone one needs no process group."""
    if rendezvous.here() is None:
        yield Ranks.alone("cuda" if torch.cuda.is_available() else "cpu")
        return
    try:
        yield start(timeout_minutes)
    finally:
        stop()


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


def add_up(tensor: Tensor, ranks: Ranks) -> None:
    """Replace a tensor by its sum over the ranks."""
    _all_reduce(tensor, ranks, dist.ReduceOp.SUM)


def together(values: Sequence[str], ranks: Ranks) -> list[str]:
    """Every rank's texts, in rank order. For messages: it pickles."""
    return [value for of_rank in from_all(list(values), ranks) for value in of_rank]


def from_first(value: T, ranks: Ranks) -> T:
    """The first rank's value, on every rank. It pickles; a lone process needs no group."""
    held = [value]
    if ranks.world_size > 1:
        ranks.traffic.add("broadcast", len(pickle.dumps(value)), root=0)
        dist.broadcast_object_list(held, src=0, device=ranks.device)
    return held[0]


def from_all(value: T, ranks: Ranks, group: Any = None) -> list[T]:
    """Every rank's value, in rank order, once all ranks are here. It pickles; a lone process needs no group."""
    values = [value] * ranks.world_size
    if ranks.world_size > 1:
        ranks.traffic.add("all_gather_object", len(pickle.dumps(value)) * ranks.world_size, group)
        dist.all_gather_object(values, value, group=group)
    return values


def meet(ranks: Ranks) -> None:
    """Return once all ranks are here; a lone process needs no group."""
    if ranks.world_size > 1:
        ranks.traffic.add("barrier", 0)
        dist.barrier()


def _all_reduce(tensor: Tensor, ranks: Ranks, op: dist.ReduceOp.RedOpType) -> None:
    ranks.traffic.add("all_reduce", tensor.numel() * tensor.element_size())
    dist.all_reduce(tensor, op)
