"""Counts what the ranks send each other: calls and bytes of every collective, within a node and between nodes.

The bytes are those that one rank receives when each piece goes straight from the rank that has it to the rank that
needs it, the least that the collective can do: of ``S`` bytes gathered or scattered over ``W`` ranks, ``S / W`` from
each of the others; of ``S`` bytes all-reduced, both; of a broadcast, all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WATCHED = (
    "all_gather_into_tensor",
    "all_gather",
    "all_gather_coalesced",
    "reduce_scatter_tensor",
    "reduce_scatter",
    "all_reduce",
    "all_reduce_coalesced",
    "broadcast",
)


@dataclass(slots=True)
class Count:
    """Of one kind of collective."""

    calls: int = 0
    within: float = 0.0
    """Bytes received from ranks of the same node."""

    between: float = 0.0
    """Bytes received from other nodes."""

    def __add__(self, other: Count) -> Count:
        return Count(self.calls + other.calls, self.within + other.within, self.between + other.between)


@dataclass(slots=True)
class Traffic:
    """The counts of one rank, by kind of collective."""

    local_world_size: int = 1
    """Ranks of a node; ranks are numbered node by node."""

    counts: dict[str, Count] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    def add(self, kind: str, nbytes: int, group: Any = None, root: int | None = None) -> None:
        """Count one call.

        Args:
            kind: the collective's name in torch.distributed.
            nbytes: of the whole result of a gather or a broadcast, or of the whole input of a reduction.
            group: the process group; the default one where None.
            root: the rank that a broadcast comes from.
        """
        ranks: Sequence[int] = dist.get_process_group_ranks(group or dist.group.WORLD)
        me = dist.get_rank()
        node = me // self.local_world_size
        neighbours = sum(rank // self.local_world_size == node for rank in ranks)
        share = nbytes / len(ranks)
        if kind == "broadcast":
            near = root is not None and root // self.local_world_size == node
            received = (nbytes if near and root != me else 0.0, 0.0 if near else nbytes)
        else:
            times = 2 if kind.startswith("all_reduce") else 1
            received = (times * share * (neighbours - 1), times * share * (len(ranks) - neighbours))
        with self._lock:  # a checkpoint is written, and agreed on, by another thread
            self.counts[kind] = self.counts.get(kind, Count()) + Count(1, *received)

    def take(self) -> dict[str, Count]:
        """The counts since the last time, and begin again from zero."""
        with self._lock:
            counts, self.counts = self.counts, {}
        return counts

    def watch(self, backend: Any) -> Callable[[], None]:
        """Count every collective that goes through `backend`'s methods of `WATCHED`. Returns what ends it."""
        originals = {name: getattr(backend, name) for name in WATCHED if hasattr(backend, name)}
        for name, original in originals.items():
            setattr(backend, name, self._counted(name, original))

        def stop() -> None:
            for name in originals:
                delattr(backend, name)  # the class's own method is seen again

        return stop

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            group = next((value for value in given if isinstance(value, dist.ProcessGroup)), None)
            root = kwargs.get("src", args[1] if name == "broadcast" and len(args) > 1 else None)
            self.add(name, _payload(given), group, root)
            return original(*args, **kwargs)

        return call


def by_kind(counts: Mapping[str, Count]) -> dict[str, float]:
    """Calls and bytes of collectives by kind, and the bytes in all, as they are logged."""
    kinds: dict[str, Count] = {}
    for name, count in counts.items():
        kind = name.replace("_into_tensor", "").replace("_tensor", "").replace("_coalesced", "")
        kinds[kind] = kinds.get(kind, Count()) + count
    values: dict[str, float] = {}
    for kind, count in kinds.items():
        values |= {f"{kind}_calls": count.calls, f"{kind}_bytes": count.within + count.between}
    values["bytes_within_node"] = sum(count.within for count in kinds.values())
    values["bytes_between_nodes"] = sum(count.between for count in kinds.values())
    return values


def _payload(arguments: Iterable[object]) -> int:
    """The bytes of the largest tensor, or list of tensors, among the arguments: the whole of what is exchanged."""
    sizes = [0]
    for argument in arguments:
        if isinstance(argument, Tensor):
            sizes.append(argument.numel() * argument.element_size())
        elif isinstance(argument, list | tuple) and all(isinstance(item, torch.Tensor) for item in argument):
            sizes.append(sum(item.numel() * item.element_size() for item in argument))
    return max(sizes)
