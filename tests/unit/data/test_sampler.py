"""The order of an epoch: every item once, no order favoured, and no state."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data import sampler


def order(items: int, seed: int, epoch: int) -> list[int]:
    return sampler.shuffled(np.arange(items, dtype=np.uint64), items, seed, epoch).tolist()


@settings(max_examples=100, deadline=None)
@given(items=st.integers(1, 4000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(items: int, seed: int, epoch: int) -> None:
    assert sorted(order(items, seed, epoch)) == list(range(items))


@pytest.mark.parametrize("items", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537, 10**6 + 3])
def test_an_epoch_is_a_permutation_at_the_edges(items: int) -> None:
    assert sorted(order(items, 7, 3)) == list(range(items))


@settings(max_examples=100, deadline=None)
@given(items=st.integers(1, 300), size=st.integers(1, 700), step=st.integers(0, 20), seed=st.integers(0, 99))
def test_a_batch_is_a_slice_of_the_stream(items: int, size: int, step: int, seed: int) -> None:
    epochs = range((step + 1) * size // items + 1)
    stream = [(epoch, item) for epoch in epochs for item in order(items, seed, epoch)]
    batch = sampler.batch(items, size, step, seed)
    assert batch == stream[step * size : (step + 1) * size]
    assert all(type(value) is int for pair in batch for value in pair)


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(order(100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_order_is_the_same_in_every_version() -> None:
    """A resumed run continues in the order of the saved run, whatever the version."""
    assert order(10, 1, 0) == [4, 5, 0, 8, 2, 6, 1, 7, 9, 3]


@pytest.mark.parametrize("items", [2, 3, 4])
def test_every_order_of_few_items_is_equally_likely(items: int) -> None:
    seen = [tuple(order(items, seed, 0)) for seed in range(1500)]
    counts = [seen.count(each) for each in itertools.permutations(range(items))]
    assert chi_square(np.array(counts)) < 5


@pytest.mark.parametrize("items", [5, 37, 64])
def test_every_item_is_equally_likely_at_every_position(items: int) -> None:
    """And equally likely to follow any other: runs of neighbours would put one page's sentences in one batch."""
    orders = np.array([order(items, seed, epoch) for seed in range(75) for epoch in range(20)])
    at_place = np.stack([np.bincount(column, minlength=items) for column in orders.T])
    assert chi_square(at_place) < 5
    steps = np.diff(orders, axis=1) % items
    assert chi_square(np.bincount(steps.ravel(), minlength=items)[1:]) < 5


def chi_square(counts: np.ndarray) -> float:
    """How far counts are from uniform, in standard deviations of the statistic under uniformity."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_a_large_epoch_takes_no_memory() -> None:
    tracemalloc.start()
    items = 10**12
    batch = sampler.batch(items, 4096, 12345, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    places = [item for _, item in batch]
    assert len(set(places)) == 4096 and min(places) >= 0 and max(places) < items
    assert peak < 4 << 20
    assert abs(np.mean(places) / items - 0.5) < 0.03
