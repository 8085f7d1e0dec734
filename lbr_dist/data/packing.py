"""Training sequences ``[sink x b y]``, packed into rows without padding.

Token order is decided only here. Everything downstream (attention, positions, labels, pooling) reads it from a
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

from lbr_dist.config import sequence_tokens
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
    """Token ids of y, the tokens to predict."""

    target_inputs: tuple[int, ...] | None = None
    """What the model reads instead of y, if it differs (dropped tokens)."""

    @property
    def inputs(self) -> int:
        """Number of y tokens fed to the model: the last one is only a label, never an input."""
        return max(0, len(self.target) - 1)

    @property
    def length(self) -> int:
        return sequence_tokens(len(self.context), self.bottleneck, self.inputs)


def digest(sequences: Iterable[TrainingSequence]) -> str:
    """A hash of 16 hexadecimal digits: different lists of sequences get the same one only by chance."""
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
    """The token to predict at this position, or `NO_LABEL`."""

    loss_kinds: Tensor
    """`TEXT_LOSS` or `TARGET_LOSS` for positions with a label."""

    layout: BottleneckLayout
    """Which keys each token sees."""

    spans: Tensor
    """``[sequences, 3]``: first index of the text, first index of the bottleneck, index after the bottleneck."""

    order: Tensor
    """``[sequences]``: index of each sequence in the list that was packed."""

    def to(self, device: torch.device | str) -> PackedRow:
        return dataclasses.replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def without_spans(self) -> PackedRow:
        """The same row with nothing to pool."""
        return dataclasses.replace(self, spans=self.spans[:0], order=self.order[:0])

    def without_labels(self, kind: int) -> PackedRow:
        """The same row without the labels of one kind of loss."""
        return dataclasses.replace(self, labels=self.labels.where(self.loss_kinds != kind, NO_LABEL))


def without(row: PackedRow, role: int) -> PackedRow:
    """The same row without the tokens of one role: `CONTEXT` or `TARGET`.

    For the two passes of the `reinject` form: ``[sink x b]``, and ``[sink b y]``, where y sees everything before it.
    Positions are kept. Spans would be meaningless, so they are empty.
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
    """Assign sequences to few, evenly filled rows.

    Args:
        lengths: tokens of each sequence.
        row_tokens: maximum tokens in a row.
        multiple: the number of rows is a multiple of this, so that each rank gets the same number; a row may be empty.

    Returns:
        The indices of each row's sequences. They depend only on the lengths.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if ordered and lengths[ordered[0]] > row_tokens:
        raise ValueError(f"a sequence of {lengths[ordered[0]]} tokens does not fit a row of {row_tokens}")
    count = -(-max(1, -(-sum(lengths) // row_tokens)) // multiple) * multiple if lengths else 0
    while True:
        # longest first, always into the emptiest row: ranks wait for the fullest one
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
    """Append one sequence to a row's lists; returns its span: start of text, start of bottleneck, end of bottleneck."""
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
    """Pack sequences with the same k into one row.

    Args:
        sequences: at least one.
        sink_id: the token that every sequence begins with.
        order: values for `PackedRow.order`; default: the indices in `sequences`.
    """
    items = list(sequences)
    ks = {s.bottleneck for s in items}
    assert len(ks) == 1, f"all sequences in a row must have the same number of bottleneck tokens, found {sorted(ks)}"
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
    """A row with no effect on the loss, for a rank that has no rows left: the others wait for it in every gather."""
    return pack_row([TrainingSequence((sink_id,), bottleneck)], sink_id).without_spans()


def rank_rows(
    sequences: list[TrainingSequence], row_tokens: int, sink_id: int, rank: int, world_size: int
) -> tuple[list[PackedRow], float]:
    """This rank's rows of a global batch (the same number on every rank), and the filled fraction of all rows."""
    rows = assign_rows([s.length for s in sequences], row_tokens, multiple=world_size)
    mine = [
        pack_row([sequences[i] for i in row], sink_id, row) if row else filler(sequences[0].bottleneck, sink_id)
        for row in rows[rank::world_size]
    ]
    return mine, sum(s.length for s in sequences) / (len(rows) * row_tokens)
