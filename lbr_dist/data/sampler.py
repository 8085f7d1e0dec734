"""Which items are in which global batch: a function of the seed and the step alone.

The order does not depend on the number of ranks, and a resumed run needs no state to go on with the next item.
"""

from __future__ import annotations

import random
from functools import lru_cache


@lru_cache(maxsize=2)
def _order(items: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(items))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def batch(items: int, size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """The global batch of a step (counted from 0): pairs of epoch and item.

    Every epoch is a new shuffle; a batch may end one epoch and begin the next.
    """
    places = range(step * size, (step + 1) * size)
    return [(place // items, _order(items, seed, place // items)[place % items]) for place in places]
