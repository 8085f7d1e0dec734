"""Sequences ``[sink x b y]``, and the rows that many of them are packed into without padding.

This is the one place that lays tokens out. Everything after it (attention, positions, labels, pooling) is read from a
`PackedRow`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lbr_dist.kernels.layout import BOTTLENECK, CONTEXT, SINK, TARGET, BottleneckLayout

NO_LABEL = -100
TEXT_LOSS, TARGET_LOSS = 0, 1
TOKEN_FIELDS = ("input_ids", "position_ids", "roles", "labels", "loss_kinds")


@dataclass(frozen=True, slots=True)
class TrainingSequence:
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
    def inputs(self) -> int:
        """Tokens of y that are read: the last one is a label only, never an input."""
        return max(0, len(self.target) - 1)

    @property
    def length(self) -> int:
        return 1 + len(self.context) + self.bottleneck + self.inputs


def digest(sequences: Iterable[TrainingSequence]) -> str:
    """16 hexadecimal digits that two different lists of sequences share only by chance."""
    hashed = hashlib.blake2b(digest_size=8)
    for sequence in sequences:
        for part in (sequence.context, sequence.target, sequence.target_inputs or ()):
            hashed.update(array("q", [len(part), *part]))
    return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Sequences one after another. All tensors are ``[tokens]`` int64 unless stated."""

    input_ids: Tensor
    """Token ids; at a bottleneck token, the number j of the token."""

    position_ids: Tensor
    """Positions, from 0 in each sequence."""

    roles: Tensor
    """`SINK`, `CONTEXT`, `BOTTLENECK` or `TARGET`."""

    labels: Tensor
    """The token to be predicted at this position, or `NO_LABEL`."""

    loss_kinds: Tensor
    """`TEXT_LOSS` or `TARGET_LOSS`, where there is a label."""

    layout: BottleneckLayout
    """Which keys each token sees."""

    spans: Tensor
    """``[sequences, 3]``: first place of the text, first place of the bottleneck, place after it."""

    order: Tensor
    """``[sequences]``: where each stands in the list of sequences that was packed."""

    def to(self, device: torch.device | str) -> PackedRow:
        return dataclasses.replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def without_spans(self) -> PackedRow:
        """The same row with nothing to pool in it."""
        return dataclasses.replace(self, spans=self.spans[:0], order=self.order[:0])

    def without_labels(self, kind: int) -> PackedRow:
        """The same row with the labels of one kind of loss taken out."""
        return dataclasses.replace(self, labels=self.labels.where(self.loss_kinds != kind, NO_LABEL))


def without(row: PackedRow, role: int) -> PackedRow:
    """The same row with the tokens of one role taken out: `CONTEXT` or `TARGET`.

    For the two passes of the `reinject` form: ``[sink x b]``, and ``[sink b y]``, in which y sees all before it. The
    positions stay as they were. Spans are meaningless afterwards, and empty.
    """
    kept = row.roles != role
    old = row.layout
    if role == TARGET:
        lengths = {"context": old.context, "bottleneck": old.bottleneck, "target": [0] * len(old.target)}
    else:
        short = [old.sink + old.bottleneck + m for m in old.target]
        lengths = {"context": short, "bottleneck": 0, "target": [0] * len(old.target)}
    layout = BottleneckLayout.from_lengths(**lengths, sink=old.sink).to(row.labels.device)  # type: ignore[arg-type]
    taken = {name: getattr(row, name)[kept] for name in TOKEN_FIELDS}
    return PackedRow(**taken, layout=layout, spans=row.spans[:0], order=row.order[:0])


def assign_rows(lengths: list[int], row_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Which sequences each row holds: few rows, evenly filled.

    Args:
        lengths: tokens of each sequence.
        row_tokens: the most tokens of a row.
        multiple: the number of rows is a multiple of this, for ranks that run one each; a row may be empty.

    Returns:
        The indices of each row's sequences. A function of the lengths alone.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if ordered and lengths[ordered[0]] > row_tokens:
        raise ValueError(f"a sequence of {lengths[ordered[0]]} tokens does not fit a row of {row_tokens}")
    count = -(-max(1, -(-sum(lengths) // row_tokens)) // multiple) * multiple if lengths else 0
    while True:
        # the longest first, always to the emptiest row: ranks wait for the fullest
        rows: list[list[int]] = [[] for _ in range(count)]
        fill = [(0, row) for row in range(count)]
        for index in ordered:
            used, row = heapq.heappop(fill)
            rows[row].append(index)
            heapq.heappush(fill, (used + lengths[index], row))
        if all(used <= row_tokens for used, _ in fill):
            return rows
        count += multiple


def _write(lines: dict[str, list[int]], sequence: TrainingSequence, sink_id: int) -> tuple[int, int, int]:
    """Append one sequence to a row's lists; returns the places of its text, of its bottleneck and after it."""
    n, k, m = len(sequence.context), sequence.bottleneck, len(sequence.target)
    fed = sequence.target if sequence.target_inputs is None else sequence.target_inputs
    start = len(lines["input_ids"])
    lines["input_ids"] += [sink_id, *sequence.context, *range(k), *fed[: sequence.inputs]]
    lines["position_ids"] += range(sequence.length)
    lines["roles"] += [SINK] + [CONTEXT] * n + [BOTTLENECK] * k + [TARGET] * sequence.inputs
    # x_i is predicted at x_{i-1} from i = 2 on; y_1 at the last bottleneck token; nothing else is scored
    lines["labels"] += [NO_LABEL, *sequence.context[1:]] + [NO_LABEL] * (k + 1 if n else k)
    if m:
        lines["labels"][-1] = sequence.target[0]
        lines["labels"] += sequence.target[1:]
    lines["loss_kinds"] += [TEXT_LOSS] * (n + k) + [TARGET_LOSS] * max(1, m)
    return start + 1, start + 1 + n, start + 1 + n + k


def pack_row(sequences: Iterable[TrainingSequence], sink_id: int, order: Iterable[int] | None = None) -> PackedRow:
    """One row of sequences of the same k.

    Args:
        sequences: at least one.
        sink_id: the token that every sequence begins with.
        order: what `PackedRow.order` says of each; their places in `sequences` where not given.
    """
    items = list(sequences)
    ks = {s.bottleneck for s in items}
    assert len(ks) == 1, f"the sequences of a row have one number of bottleneck tokens, found {sorted(ks)}"
    lines: dict[str, list[int]] = {name: [] for name in TOKEN_FIELDS}
    spans = [_write(lines, sequence, sink_id) for sequence in items]
    return PackedRow(
        **{name: torch.tensor(values) for name, values in lines.items()},
        layout=BottleneckLayout.from_lengths(
            context=[1 + len(s.context) for s in items],
            bottleneck=ks.pop(),
            target=[s.inputs for s in items],
            sink=1,
        ),
        spans=torch.tensor(spans, dtype=torch.int64),
        order=torch.tensor(list(range(len(items)) if order is None else order), dtype=torch.int64),
    )


def filler(bottleneck: int, sink_id: int) -> PackedRow:
    """A row that counts for nothing, for a rank that has none left: the others wait for it in every gather."""
    return pack_row([TrainingSequence((sink_id,), bottleneck)], sink_id).without_spans()


def pack(sequences: list[TrainingSequence], row_tokens: int, sink_id: int) -> list[PackedRow]:
    """Rows of up to `row_tokens`, without padding.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    assigned = assign_rows([s.length for s in sequences], row_tokens)
    return [pack_row([sequences[i] for i in row], sink_id, row) for row in assigned]


def rank_rows(
    sequences: list[TrainingSequence], row_tokens: int, sink_id: int, rank: int, world_size: int
) -> tuple[list[PackedRow], float]:
    """This rank's rows of a global batch, as many on every rank, and the share of all rows' room that is filled."""
    rows = assign_rows([s.length for s in sequences], row_tokens, multiple=world_size)
    mine = [
        pack_row([sequences[i] for i in row], sink_id, row) if row else filler(sequences[0].bottleneck, sink_id)
        for row in rows[rank::world_size]
    ]
    return mine, sum(s.length for s in sequences) / (len(rows) * row_tokens)
