"""Sends representations to every rank, and gradients back: this makes every rank's documents negatives.

    gather    this rank's rows -> all ranks' rows, in rank order          one all-gather
    reduce    a gradient for all rows -> the sum over ranks for its own    one reduce-scatter

The two-level form sends each row to a node once, not once to each of its ranks: ranks with the same local rank exchange
first, then the ranks inside a node; gradients take the reverse path. The rows are the same, and the sums differ only in
the order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lbr_dist.ranks.group import Ranks

Route = Literal["auto", "flat", "two_level"]


@dataclass(frozen=True, slots=True)
class Level:
    """One collective's process group."""

    group: Any
    size: int


class Exchange:
    """Gathers rows and reduces their gradients over all ranks. Building it is a collective.

    Args:
        ranks: this process among its peers.
        route: `flat` is one collective over all ranks; `two_level` one between nodes and one inside each; `auto` takes
            two levels if there are several nodes with equally many ranks.

    Raises:
        ValueError: two levels are asked for, and the ranks do not fill nodes evenly.
    """

    def __init__(self, ranks: Ranks, route: Route = "auto") -> None:
        self.ranks = ranks
        world, local = ranks.world_size, ranks.local_world_size
        even = world % local == 0
        if route == "two_level" and not even:
            raise ValueError(f"{world} ranks do not fill nodes of {local} evenly; two levels need nodes alike")
        two_levels = even and (route == "two_level" or (route == "auto" and 1 < local < world))
        if not two_levels:
            self.levels = [Level(None, world)]
            return
        nodes = world // local
        # every rank makes every group, in the same order: that is how torch.distributed wants it
        across = [dist.new_group([node * local + place for node in range(nodes)]) for place in range(local)]
        inside = [dist.new_group([node * local + place for place in range(local)]) for node in range(nodes)]
        self.levels = [
            Level(across[ranks.rank % local], nodes),
            Level(inside[ranks.rank // local], local),
        ]

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows, in rank order.

        Args:
            rows: ``[counts[rank], d]``, this rank's, without gradient.
            counts: rows of each rank.

        Returns:
            ``[sum(counts), d]``, the same on every rank.
        """
        most = max(counts)
        gathered = rows
        if len(rows) < most:
            gathered = rows.new_zeros(most, rows.shape[1])
            gathered[: len(rows)] = rows
        for level in self.levels:
            whole = rows.new_empty(level.size * len(gathered), rows.shape[1])
            self._count("all_gather_into_tensor", whole, level)
            dist.all_gather_into_tensor(whole, gathered.contiguous(), group=level.group)
            gathered = whole
        if len(self.levels) == 2:  # [local, nodes, most] to [nodes, local, most]
            across, inside = (level.size for level in self.levels)
            gathered = gathered.view(inside, across, most, -1).transpose(0, 1).reshape(len(gathered), -1)
        if min(counts) == most:
            return gathered
        return torch.cat([gathered[i * most : i * most + n] for i, n in enumerate(counts)])

    def reduce(self, gradient: Tensor, counts: Sequence[int]) -> Tensor:
        """The transpose of `gather`: the sum of every rank's ``[sum(counts), d]``, of which each keeps its own rows."""
        most = max(counts)
        reduced = gradient
        if min(counts) < most:
            reduced = gradient.new_zeros(len(counts) * most, gradient.shape[1])
            for i, part in enumerate(gradient.split(list(counts))):
                reduced[i * most : i * most + len(part)] = part
        if len(self.levels) == 2:
            across, inside = (level.size for level in self.levels)
            reduced = reduced.view(across, inside, most, -1).transpose(0, 1).reshape(len(reduced), -1)
        for level in reversed(self.levels):
            mine = reduced.new_empty(len(reduced) // level.size, reduced.shape[1])
            self._count("reduce_scatter_tensor", reduced, level)
            dist.reduce_scatter_tensor(mine, reduced.contiguous(), group=level.group)
            reduced = mine
        return reduced[: counts[self.ranks.rank]]

    def _count(self, kind: str, whole: Tensor, level: Level) -> None:
        self.ranks.traffic.add(kind, whole.numel() * whole.element_size(), level.group)
