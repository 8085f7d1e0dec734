"""Rows hold every sequence once, with the positions, labels and roles of the definition in data/packing.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data import sampler
from lbr_dist.data.packing import NO_LABEL, TARGET_LOSS, Sequence, assign_rows, pack, without
from lbr_dist.kernels.attention import BOTTLENECK, CONTEXT, SINK, TARGET

SINK_ID = 99
tokens = st.lists(st.integers(1, 50), min_size=0, max_size=6).map(tuple)


@st.composite
def sequence(draw: st.DrawFn) -> Sequence:
    target = draw(tokens)
    dropped = draw(st.booleans())
    inputs = tuple(0 for _ in target) if dropped else None
    bottleneck = draw(st.integers(0, 3))
    context = draw(tokens)
    return Sequence(context, bottleneck, target, inputs)


@given(st.lists(sequence(), min_size=1, max_size=8), st.integers(20, 40), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_pack(sequences: list[Sequence], row_tokens: int, empty: int) -> None:
    needed = len(assign_rows([s.length for s in sequences], row_tokens))
    rows = pack(sequences, row_tokens, SINK_ID, rows=needed + empty)
    assert len(rows.input_ids) == needed + empty
    assert sorted(rows.order.tolist()) == list(range(len(sequences)))
    assert int((rows.segment_ids >= 0).sum()) == sum(s.length for s in sequences)
    for (row, text, bottleneck, end), index in zip(rows.spans.tolist(), rows.order.tolist(), strict=True):
        s = sequences[index]
        n, k, m = len(s.context), s.bottleneck, len(s.target)
        part = slice(text - 1, text - 1 + s.length)
        fed = s.target if s.target_inputs is None else s.target_inputs
        assert rows.input_ids[row, part].tolist() == [SINK_ID, *s.context, *range(k), *fed[: max(0, m - 1)]]
        assert rows.position_ids[row, part].tolist() == list(range(s.length))
        assert rows.roles[row, part].tolist() == [SINK] + [CONTEXT] * n + [BOTTLENECK] * k + [TARGET] * max(0, m - 1)
        assert len(set(rows.segment_ids[row, part].tolist())) == 1
        assert (bottleneck, end) == (text + n, text + n + k)
        labels = [NO_LABEL] * s.length
        for i in range(2, n + 1):  # x_i is predicted at x_{i-1}, which stands in column i - 1
            labels[i - 1] = s.context[i - 1]
        kinds = [0] * s.length
        for t in range(m):  # y_1 at the last token before the target, y_t at y_{t-1}
            labels[n + k + t] = s.target[t]
            kinds[n + k + t] = TARGET_LOSS
        assert rows.labels[row, part].tolist() == labels
        scored = rows.labels[row, part] != NO_LABEL
        assert rows.loss_kinds[row, part][scored].tolist() == [q for q, y in zip(kinds, labels, strict=True) if y >= 0]


@given(st.lists(sequence(), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_select_takes_spans_along(sequences: list[Sequence], step: int) -> None:
    rows = pack(sequences, 20, SINK_ID)
    seen = []
    for start in range(step):
        part = rows.select(slice(start, None, step))
        for (row, text, _, end), index in zip(part.spans.tolist(), part.order.tolist(), strict=True):
            seen.append(index)
            s = sequences[index]
            assert part.input_ids[row, text : text + len(s.context)].tolist() == list(s.context)
            assert end == text + len(s.context) + s.bottleneck
    assert sorted(seen) == list(range(len(sequences)))


@given(st.lists(sequence(), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_without_a_role(sequences: list[Sequence]) -> None:
    rows = pack(sequences, 24, SINK_ID)
    for role in (CONTEXT, TARGET):
        kept = without(rows, role)
        keep = (rows.roles != role) & (rows.segment_ids >= 0)
        stay = kept.segment_ids >= 0
        for name in ("input_ids", "position_ids", "segment_ids", "roles", "labels"):
            assert getattr(kept, name)[stay].tolist() == getattr(rows, name)[keep].tolist()
        assert (kept.labels[~stay] == NO_LABEL).all()


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        pack([Sequence((1,) * 6, 2)], 8, SINK_ID)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_item_once_an_epoch(items: int, size: int, seed: int) -> None:
    stream = [place for step in range(6) for place in sampler.batch(items, size, step, seed)]
    for epoch in range(len(stream) // items):
        part = stream[epoch * items : (epoch + 1) * items]
        assert {e for e, _ in part} == {epoch}
        assert sorted(i for _, i in part) == list(range(items))
    assert sampler.batch(items, size, 3, seed) == stream[3 * size : 4 * size]


def test_orders_differ() -> None:
    first = sampler.batch(50, 50, 0, 0)
    assert first != sampler.batch(50, 50, 0, 1)
    assert [i for _, i in first] != [i for _, i in sampler.batch(50, 50, 1, 0)]
    assert torch.tensor([i for _, i in first]).sort().values.tolist() == list(range(50))
