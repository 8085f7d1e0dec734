"""Which items are in which global batch. Depends only on the seed and the step.

The order does not depend on the number of ranks, and a resumed run needs no state to find the next item. Each position
is computed independently, so an epoch takes no memory, however many items there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # even, so that both halves are changed equally often


def batch(items: int, size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """The global batch of a step (counted from 0): pairs of epoch and item.

    Every epoch is a new shuffle; a batch may end one epoch and begin the next.
    """
    chosen: list[tuple[int, int]] = []
    place, end = step * size, (step + 1) * size
    while place < end:
        epoch, first = divmod(place, items)
        last = min(items, first + end - place)
        order = shuffled(np.arange(first, last, dtype=np.uint64), items, seed, epoch)
        chosen += [(epoch, item) for item in order.tolist()]
        place += last - first
    return chosen


def source_batch(sizes: Sequence[int], size: int, step: int, seed: int) -> tuple[int, list[tuple[int, int]]]:
    """The global batch of a step when each batch has one source: the source, and its pairs of epoch and item.

    In a round, each source gets as many batches as its items fill, at least one. Each round has its own order. The
    batches of one source run through its items as if it were the only one.

    Args:
        sizes: number of items of each source, at least one each.
        size: items per batch.
        step: counted from 0.
        seed: the run's seed.
    """
    shares = [max(1, round(items / size)) for items in sizes]
    turns = sum(shares)
    number, place = divmod(step, turns)
    turn = int(shuffled(np.array([place], dtype=np.uint64), turns, seed, number)[0])
    source = 0
    while turn >= shares[source]:
        turn -= shares[source]
        source += 1
    # one seed per source: sources of the same size would otherwise be shuffled the same way
    return source, batch(sizes[source], size, number * shares[source] + turn, seed * len(sizes) + source)


def shuffled(places: NDArray[np.uint64], items: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """The items at the given positions of an epoch's order: a permutation of 0 .. items - 1, keyed by seed and epoch.

    A Feistel network over pairs (left, right) with left < a, right < b, where a x b is the smallest such rectangle
    that holds all items. A result outside the items is permuted again until it is inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, methods 2 and 3).

    Args:
        places: positions, ``[n]`` uint64, each below `items`.
        items: number of items, at most 2^63.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        ``[n]`` uint64.
    """
    a = math.isqrt(items - 1) + 1
    b = -(-items // a)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    order = places.copy()
    outside = np.arange(len(places))
    while len(outside):
        left, right = np.divmod(order[outside], np.uint64(b))
        for number in range(0, _ROUNDS, 2):
            left = (left + _mixed(right, keys[number]) % np.uint64(a)) % np.uint64(a)
            right = (right + _mixed(left, keys[number + 1]) % np.uint64(b)) % np.uint64(b)
        order[outside] = left * np.uint64(b) + right
        outside = outside[order[outside] >= items]
    return order


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A pseudo-random uint64 from each value and the key: the finaliser of SplitMix64."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def seed_of(key: str) -> int:
    """A seed of 56 bits for what is drawn under this key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
