"""How sequences ``[x b y]`` are packed into one row, and which keys each token may see.

A token sees the tokens of its own sequence at or before it, except that a target token never sees the context: all it
knows about ``x`` comes from the bottleneck ``b`` (and from the sink, the context's first tokens, which say nothing
about ``x``). This needs no mask, since it is two plain causal attentions:

    queries  x b    keys    x b
    queries  y      keys  s b y    the causal diagonal ends at the bottom right, so every query sees s and b

The queries of both are already consecutive in the row; only the keys of ``s`` and ``b`` are read twice. Any kernel for
packed causal attention with at least as many keys as queries runs all of it in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

SINK, CONTEXT, BOTTLENECK, TARGET = range(4)
"""Roles of a token within its sequence."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One plain causal attention: `queries` consecutive tokens, over at least as many keys."""

    start: int
    """The first query's position in the row."""

    queries: int
    keys: tuple[range, ...]
    """Positions of the keys in the row; the last ``queries`` of them are the queries' own."""

    @property
    def offset(self) -> int:
        """How many keys come before the queries' own; every query sees them."""
        return sum(map(len, self.keys)) - self.queries


@dataclass(frozen=True, slots=True)
class BottleneckLayout:
    """The sequences of one packed row. Build it with `from_lengths`."""

    context: tuple[int, ...]
    """Tokens of each sequence's x, including the sink."""

    bottleneck: int
    """k, the same for every sequence."""

    target: tuple[int, ...]
    """Tokens of each sequence's y."""

    sink: int
    """How many leading context tokens the target sees as well."""

    cu_queries: Tensor
    """``[segments + 1]`` int32: where each segment's queries start in the row, and where the last ends."""

    cu_keys: Tensor
    """``[segments + 1]`` int32: where each segment's keys start in `key_index`, and where the last ends."""

    key_index: Tensor
    """``[keys]`` int64: the positions in the row of every segment's keys."""

    segments: tuple[Segment, ...]
    """The plain causal attentions that make up the layout, in the row's order."""

    prepared: dict[object, object] = field(default_factory=dict, compare=False, repr=False)
    """What a backend computes once for all layers."""

    @staticmethod
    def from_lengths(
        *, context: Sequence[int], bottleneck: int, target: Sequence[int], sink: int = 0
    ) -> BottleneckLayout:
        """Pack sequences one after another.

        Args:
            context: tokens of each sequence's x.
            bottleneck: k. With 0, y sees all of x: plain causal attention over the whole sequence.
            target: tokens of each sequence's y; 0 is plain causal attention over ``[x b]``.
            sink: how many leading tokens of x the target sees as well.

        Raises:
            ValueError: lengths are negative, differ in number, or are shorter than the sink.
        """
        if len(context) != len(target):
            raise ValueError(
                f"found {len(context)} context lengths and {len(target)} target lengths, expected the same number"
            )
        if min((*context, *target, bottleneck, sink), default=0) < 0:
            raise ValueError("found a negative length, expected zero or more tokens")
        if bottleneck and min((n for n, m in zip(context, target, strict=True) if m), default=sink) < sink:
            raise ValueError(f"found a context shorter than the sink of {sink} tokens, which its target must see")
        segments: list[Segment] = []
        parts: list[tuple[int, int, tuple[range, ...]]]
        start = 0
        for n, m in zip(context, target, strict=True):
            if bottleneck == 0:
                parts = [(start, n + m, (range(start, start + n + m),))]
            else:
                middle, end = start + n + bottleneck, start + n + bottleneck + m
                parts = [
                    (start, n + bottleneck, (range(start, middle),)),
                    (middle, m, (range(start, start + sink), range(start + n, end))),
                ]
            segments += [Segment(first, queries, keys) for first, queries, keys in parts if queries]
            start += n + bottleneck + m
        cu_queries = [0, *accumulate(s.queries for s in segments)]
        cu_keys = [0, *accumulate(s.queries + s.offset for s in segments)]
        places = [place for s in segments for part in s.keys for place in part]
        return BottleneckLayout(
            tuple(context),
            bottleneck,
            tuple(target),
            sink,
            torch.tensor(cu_queries, dtype=torch.int32),
            torch.tensor(cu_keys, dtype=torch.int32),
            torch.tensor(places, dtype=torch.int64),
            tuple(segments),
        )

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.context) + sum(self.target) + self.bottleneck * len(self.context)

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a segment."""
        return (
            max((s.queries for s in self.segments), default=0),
            max((s.queries + s.offset for s in self.segments), default=0),
        )

    def to(self, device: torch.device | str) -> BottleneckLayout:
        """The same layout with its tensors on `device`."""
        if self.key_index.device == torch.device(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ("cu_queries", "cu_keys", "key_index")}
        return replace(self, **moved, prepared={})

    def mask(self, window: int | None = None) -> Tensor:
        """The definition, written out: ``[tokens, tokens]`` bool on the CPU, true where a query (row) sees a key.

        Args:
            window: if given, a query sees itself and the ``window - 1`` tokens before it. For a target, the sink counts
                as directly before the bottleneck: tokens that it doesn't see take no room in its window.
        """
        seen = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        start = 0
        for n, m in zip(self.context, self.target, strict=True):
            length = n + self.bottleneck + m
            place = torch.arange(length)
            distance = place[:, None] - place[None, :]
            visible = distance >= 0
            if self.bottleneck:
                is_target = place >= n + self.bottleneck
                hidden = (place >= self.sink) & (place < n)
                visible &= ~(is_target[:, None] & hidden[None, :])
                is_sink = place < min(self.sink, n)
                distance = distance - (is_target[:, None] & is_sink[None, :]) * (n - self.sink)
            if window is not None:
                visible &= distance < window
            seen[start : start + length, start : start + length] = visible
            start += length
        return seen
