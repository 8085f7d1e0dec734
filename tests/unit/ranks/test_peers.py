"""Ranks that have met: whether they are numbered node by node, and how they share cores."""

from __future__ import annotations

from dataclasses import replace

from lbr_dist.ranks.peers import Peer, misplaced
from lbr_dist.ranks.rendezvous import Placement


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
        "rank 2 on a: found ranks of other nodes between those of this node, expected its 2 in a row"
    )
    assert "expected its 3 in a row" in str(misplaced(peers(("a", 0, 3), ("b", 0, 1), ("a", 1, 3), ("a", 2, 3))))
    assert misplaced(peers(("a", 0, 2), ("a", 0, 2))) == (
        "rank 1 on a: found local rank 0 of 2, expected 1 of the 2 ranks there"
    )
    assert misplaced(peers(("a", 0, 1), ("a", 1, 2))) == (
        "rank 0 on a: found local rank 0 of 1, expected 0 of the 2 ranks there"
    )
    assert misplaced(peers(("a", 0, 2), ("a", 1, 2), world=3)) == ("rank 0 on a: found world size 3, expected 2")
    same_name = peers(("localhost", 0, 1), ("localhost", 0, 1))
    assert misplaced([same_name[0], replace(same_name[1], node=("localhost", "another boot"))]) is None


def test_ranks_that_may_use_the_same_cores_share_them() -> None:
    a, b, c = peers(("a", 0, 2), ("a", 1, 2), ("b", 0, 1))
    assert [each.share_of_cores([a, b, c]) for each in (a, b, c)] == [1, 1, 2]
    a, b = replace(a, cores=frozenset(range(8))), replace(b, cores=frozenset(range(8, 16)))
    assert [each.share_of_cores([a, b]) for each in (a, b)] == [8, 8]  # srun --cpus-per-task=8
    a, b = replace(a, cores=frozenset({0})), replace(b, cores=frozenset({0}))
    assert [each.share_of_cores([a, b]) for each in (a, b)] == [1, 1]
