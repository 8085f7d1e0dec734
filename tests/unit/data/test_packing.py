"""Rows contain every sequence once, with the positions, labels and roles defined in data/packing.py."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.packing import (
    NO_LABEL,
    TARGET_LOSS,
    PackedRow,
    TrainingSequence,
    assign_rows,
    filler,
    rank_rows,
    without,
)
from lbr_dist.kernels.layout import BOTTLENECK, CONTEXT, SINK, TARGET

SINK_ID = 99


def pack(sequences: list[TrainingSequence], row_tokens: int, sink_id: int) -> list[PackedRow]:
    """The rows of a lone rank."""
    return rank_rows(sequences, row_tokens, sink_id, rank=0, world_size=1)[0]


tokens = st.lists(st.integers(1, 50), min_size=0, max_size=6).map(tuple)


@st.composite
def batches(draw: st.DrawFn) -> list[TrainingSequence]:
    k = draw(st.integers(0, 3))

    def one() -> TrainingSequence:
        target = draw(tokens)
        return TrainingSequence(draw(tokens), k, target, tuple(0 for _ in target) if draw(st.booleans()) else None)

    return [one() for _ in range(draw(st.integers(1, 8)))]


def check_row(row: PackedRow, sequences: list[TrainingSequence]) -> None:
    """The row contains every sequence as defined, one after another, and nothing else."""
    start = 0
    for (text, bottleneck, end), index in zip(row.spans.tolist(), row.order.tolist(), strict=True):
        s = sequences[index]
        n, k, m = len(s.context), s.bottleneck, len(s.target)
        part = slice(start, start + s.length)
        fed = s.target if s.target_inputs is None else s.target_inputs
        assert (text, bottleneck, end) == (start + 1, start + 1 + n, start + 1 + n + k)
        assert row.input_ids[part].tolist() == [SINK_ID, *s.context, *range(k), *fed[: max(0, m - 1)]]
        assert row.position_ids[part].tolist() == list(range(s.length))
        assert row.roles[part].tolist() == [SINK] + [CONTEXT] * n + [BOTTLENECK] * k + [TARGET] * max(0, m - 1)
        labels = [NO_LABEL] * s.length
        for i in range(2, n + 1):  # x_i is predicted at x_{i-1}, which is token i - 1 of the sequence
            labels[i - 1] = s.context[i - 1]
        kinds = [0] * s.length
        for t in range(m):  # y_1 at the last token before the target, y_t at y_{t-1}
            labels[n + k + t] = s.target[t]
            kinds[n + k + t] = TARGET_LOSS
        assert row.labels[part].tolist() == labels
        scored = row.labels[part] != NO_LABEL
        assert row.loss_kinds[part][scored].tolist() == [q for q, y in zip(kinds, labels, strict=True) if y >= 0]
        start += s.length
    assert row.layout.tokens == len(row.input_ids) == start
    assert row.layout.context == tuple(1 + len(sequences[i].context) for i in row.order)
    assert row.layout.target == tuple(sequences[i].inputs for i in row.order)


@given(batches(), st.integers(20, 40))
@settings(max_examples=150, deadline=None)
def test_pack(sequences: list[TrainingSequence], row_tokens: int) -> None:
    rows = pack(sequences, row_tokens, SINK_ID)
    assert sorted(i for row in rows for i in row.order.tolist()) == list(range(len(sequences)))
    for row in rows:
        assert len(row.input_ids) <= row_tokens
        check_row(row, sequences)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 60), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_rows_are_few_and_even(lengths: list[int], row_tokens: int, multiple: int) -> None:
    rows = assign_rows(lengths, row_tokens, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) % multiple == 0
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used, default=0) <= row_tokens
    # sequences of up to half a row (and more) leave at most half of it free
    assert len(rows) <= -(-2 * sum(lengths) // row_tokens) + multiple
    if lengths:
        assert max(used) - min(used) <= max(lengths)


@given(batches(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_ranks_share_a_batch(sequences: list[TrainingSequence], world_size: int) -> None:
    """Every sequence is on one rank, all ranks have the same number of rows, and rows are packed as on one rank."""
    shares = [rank_rows(sequences, 40, SINK_ID, rank, world_size) for rank in range(world_size)]
    assert len({len(rows) for rows, _ in shares}) == 1 and len({filled for _, filled in shares}) == 1
    assert sorted(i for rows, _ in shares for row in rows for i in row.order.tolist()) == list(range(len(sequences)))
    filled = sum(s.length for s in sequences) / (40 * sum(len(rows) for rows, _ in shares))
    assert shares[0][1] == pytest.approx(filled)
    for rows, _ in shares:
        for row in rows:
            if len(row.order):
                check_row(row, sequences)
            else:
                assert (row.labels == NO_LABEL).all() and len(row.spans) == 0


@given(batches())
@settings(max_examples=60, deadline=None)
def test_without_a_role(sequences: list[TrainingSequence]) -> None:
    for row in pack(sequences, 24, SINK_ID):
        for role in (CONTEXT, TARGET):
            kept = without(row, role)
            keep = row.roles != role
            for name in ("input_ids", "position_ids", "roles", "labels"):
                assert getattr(kept, name).tolist() == getattr(row, name)[keep].tolist()
            assert kept.layout.tokens == len(kept.input_ids)
            # the remaining tokens see what they saw before, but the target sees everything before it
            seen = row.layout.mask()[keep][:, keep]
            assert (kept.layout.mask() == seen).all()


def test_a_target_sees_all_but_the_text() -> None:
    """Without the text, nothing is masked: by the layout's own definition, not only ours."""
    row = pack([TrainingSequence((1, 2, 3), 2, (4, 5, 6))], 24, SINK_ID)[0]
    mask = without(row, CONTEXT).layout.mask()
    assert mask.equal(mask.new_ones(mask.shape).tril())


def test_labels_of_one_kind() -> None:
    row = pack([TrainingSequence((1, 2, 3), 2, (4, 5))], 24, SINK_ID)[0]
    assert row.without_labels(TARGET_LOSS).labels.tolist() == [NO_LABEL, 2, 3] + [NO_LABEL] * 4
    assert filler(2, SINK_ID).layout.tokens == 4


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        pack([TrainingSequence((1,) * 6, 2)], 8, SINK_ID)


def test_different_bottlenecks_in_one_row_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"found \[1, 2\]"):
        pack([TrainingSequence((1,), 1), TrainingSequence((1,), 2)], 8, SINK_ID)
    assert dataclasses.replace(TrainingSequence((1,), 1), target=(2, 3)).inputs == 1
