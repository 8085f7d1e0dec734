"""What ranks tell each other when they meet, and the check that the two-level exchange can rely on their numbering.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lbr_dist.ranks.rendezvous import Launcher, Placement, node_name

_AGENTS: dict[Launcher, str] = {"torchrun": "GROUP_RANK", "deepspeed": "CROSS_RANK"}


@dataclass(frozen=True, slots=True)
class Peer:
    """What a rank tells the others about itself."""

    place: Placement
    node: tuple[str, str]
    """The node's name, and what distinguishes nodes of the same name."""

    cores: frozenset[int]

    @classmethod
    def of(cls, place: Placement) -> Peer:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # for these launchers each agent counts as a node, even if two agents share a machine
        agent = os.environ.get(_AGENTS.get(place.launcher, ""), "")
        return cls(place, (node_name(), f"{boot} {agent}"), frozenset(os.sched_getaffinity(0)))

    def share_of_cores(self, peers: Sequence[Peer]) -> int:
        """How many cores this rank gets; some launchers give each rank its own cores."""
        sharing = sum(peer.node == self.node and bool(peer.cores & self.cores) for peer in peers)
        return max(1, len(self.cores) // sharing)


def misplaced(peers: Sequence[Peer]) -> str | None:
    """What was found and expected for the first rank that is out of place; None if all are in place.

    Args:
        peers: every rank's, in rank order.
    """
    sizes = {node: sum(peer.node == node for peer in peers) for node in {peer.node for peer in peers}}
    begun: dict[tuple[str, str], int] = {}
    for rank, peer in enumerate(peers):
        place, size = peer.place, sizes[peer.node]
        expected = rank - begun.setdefault(peer.node, rank)
        where = f"rank {rank} on {peer.node[0]}"
        if place.world_size != len(peers):
            return f"{where}: found world size {place.world_size}, expected {len(peers)}"
        if expected >= size or (expected and peers[rank - 1].node != peer.node):
            return f"{where}: found ranks of other nodes between those of this node, expected its {size} in a row"
        if (place.local_rank, place.local_world_size) != (expected, size):
            found = f"local rank {place.local_rank} of {place.local_world_size}"
            return f"{where}: found {found}, expected {expected} of the {size} ranks there"
    return None
