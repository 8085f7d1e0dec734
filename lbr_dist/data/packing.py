"""Sequences ``[sink x b y]`` and the rows that many of them are packed into.

This is the one place that lays tokens out. Everything after it (mask, positions, labels, pooling) is read from
the tensors of a `PackedRows`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lbr_dist.kernels.attention import BOTTLENECK, CONTEXT, SINK, TARGET

NO_LABEL = -100
TEXT_LOSS, TARGET_LOSS = 0, 1
TOKEN_FIELDS = ("input_ids", "position_ids", "segment_ids", "roles", "labels", "loss_kinds")


@dataclass(frozen=True, slots=True)
class Sequence:
    """One text, the bottleneck after it, and the target that follows."""

    context: tuple[int, ...]
    """Token ids of x."""

    bottleneck: int
    """k, the number of bottleneck tokens."""

    target: tuple[int, ...] = ()
    """Token ids of y, what is to be predicted."""

    target_inputs: tuple[int, ...] | None = None
    """What the model reads in the place of y, where it differs (dropped tokens)."""

    @property
    def length(self) -> int:
        # the last token of y is a label only, never an input
        return 1 + len(self.context) + self.bottleneck + max(0, len(self.target) - 1)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of packed sequences. All tensors are ``[rows, tokens]`` int64 unless stated."""

    input_ids: Tensor
    """Token ids; at a bottleneck token, the number j of the token."""

    position_ids: Tensor
    """Positions, from 0 in each sequence."""

    segment_ids: Tensor
    """The sequence a token belongs to, counted within its row; -1 is padding."""

    roles: Tensor
    """`SINK`, `CONTEXT`, `BOTTLENECK` or `TARGET`."""

    labels: Tensor
    """The token to be predicted at this position, or `NO_LABEL`."""

    loss_kinds: Tensor
    """`TEXT_LOSS` or `TARGET_LOSS`, where there is a label."""

    spans: Tensor
    """``[sequences, 4]``: row, first column of the text, first column of the bottleneck, column after it."""

    order: Tensor
    """``[sequences]``: the place of each span in the list of sequences that was packed."""

    def to(self, device: torch.device | str) -> PackedRows:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, rows: slice) -> PackedRows:
        """Some of the rows, with the spans that lie in them."""
        chosen = torch.arange(len(self.input_ids))[rows]
        place = torch.full((len(self.input_ids),), -1)
        place[chosen] = torch.arange(len(chosen))
        kept = place[self.spans[:, 0]] >= 0
        spans = self.spans[kept]
        spans[:, 0] = place[spans[:, 0]]
        taken = {name: getattr(self, name)[rows] for name in TOKEN_FIELDS}
        return PackedRows(**taken, spans=spans, order=self.order[kept])

    def without_spans(self) -> PackedRows:
        """The same rows with nothing to pool in them."""
        return replace(self, spans=self.spans[:0], order=self.order[:0])

    def without_labels(self, kind: int) -> PackedRows:
        """The same rows with the labels of one kind of loss taken out."""
        return replace(self, labels=self.labels.where(self.loss_kinds != kind, NO_LABEL))


def without(rows: PackedRows, role: int) -> PackedRows:
    """The same rows with the tokens of one role taken out, and no others: positions and segments stay.

    For the two passes of the `reinject` form. The order of the tokens that stay is kept. Spans are meaningless
    afterwards, and empty.
    """
    keep = (rows.roles != role) & (rows.segment_ids >= 0)
    width = max(1, int(keep.sum(1).max()))
    index = torch.argsort((~keep).int(), dim=1, stable=True)[:, :width]
    kept = keep.gather(1, index)
    taken = {name: getattr(rows, name).gather(1, index) for name in TOKEN_FIELDS}
    taken["segment_ids"] = taken["segment_ids"].where(kept, -1)
    taken["labels"] = taken["labels"].where(kept, NO_LABEL)
    taken["roles"] = taken["roles"].where(kept, CONTEXT)
    return PackedRows(**taken, spans=rows.spans[:0], order=rows.order[:0])


def assign_rows(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the indices of the sequences of each row.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_tokens:
            raise ValueError(f"a sequence of {lengths[index]} tokens does not fit a row of {row_tokens}")
        row = next((row for row, free in enumerate(room) if lengths[index] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _write(lines: dict[str, list[int]], sequence: Sequence, segment: int, sink_id: int) -> tuple[int, int, int]:
    """Append one sequence to a row's lists; returns the columns of its text, of its bottleneck and after it."""
    n, k, m = len(sequence.context), sequence.bottleneck, len(sequence.target)
    inputs = sequence.target if sequence.target_inputs is None else sequence.target_inputs
    start = len(lines["input_ids"])
    length = sequence.length
    lines["input_ids"] += [sink_id, *sequence.context, *range(k), *inputs[: max(0, m - 1)]]
    lines["position_ids"] += range(length)
    lines["segment_ids"] += [segment] * length
    lines["roles"] += [SINK] + [CONTEXT] * n + [BOTTLENECK] * k + [TARGET] * max(0, m - 1)
    # x_i is predicted at x_{i-1} from i = 2 on; y_1 at the last bottleneck token; nothing else is scored
    lines["labels"] += [NO_LABEL, *sequence.context[1:]] + [NO_LABEL] * (k + 1 if n else k)
    if m:
        lines["labels"][-1] = sequence.target[0]
        lines["labels"] += sequence.target[1:]
    lines["loss_kinds"] += [TEXT_LOSS] * (n + k) + [TARGET_LOSS] * max(1, m)
    return start + 1, start + 1 + n, start + 1 + n + k


def pack(sequences: Iterable[Sequence], row_tokens: int, sink_id: int, rows: int | None = None) -> PackedRows:
    """Lay sequences out in rows of `row_tokens`, padded where nothing fits.

    Args:
        sequences: what to pack; the result says in `order` where each went.
        row_tokens: tokens of a row. Rows are cut to the fullest one.
        sink_id: the token that every sequence begins with.
        rows: the number of rows wanted (empty ones are added), for ranks that must run in lockstep.

    Raises:
        ValueError: a sequence is longer than a row, or `rows` is less than what is needed.
    """
    items = list(sequences)
    assigned = assign_rows([s.length for s in items], row_tokens)
    if rows is not None:
        if rows < len(assigned):
            raise ValueError(f"{len(assigned)} rows do not fit in {rows}")
        assigned += [[] for _ in range(rows - len(assigned))]
    empty = {"input_ids": sink_id, "position_ids": 0, "segment_ids": -1, "roles": CONTEXT, "labels": NO_LABEL}
    table: list[dict[str, list[int]]] = []
    spans: list[tuple[int, int, int, int]] = []
    order: list[int] = []
    for row, members in enumerate(assigned):
        lines: dict[str, list[int]] = {name: [] for name in TOKEN_FIELDS}
        for segment, index in enumerate(members):
            spans.append((row, *_write(lines, items[index], segment, sink_id)))
            order.append(index)
        table.append(lines)
    width = max((len(lines["input_ids"]) for lines in table), default=0) or 1
    tensors = {
        name: torch.tensor([lines[name] + [empty.get(name, 0)] * (width - len(lines[name])) for lines in table])
        for name in TOKEN_FIELDS
    }
    return PackedRows(
        **tensors,
        spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 4),
        order=torch.tensor(order, dtype=torch.int64),
    )
