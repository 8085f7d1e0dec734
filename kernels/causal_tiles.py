"""Packed causal attention on a CPU: plain matrix products over tiles of queries, similar lengths stacked.

A tile of queries is multiplied only with the keys up to its own end, so about half of the square is never computed,
and nothing is computed between sequences. Segments of similar length are stacked, since a CPU is faster at batched
matrix products. Backward recomputes the probabilities of long segments and keeps those of short ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbr_dist.kernels.layout import BottleneckLayout, Segment

TILE = 128
"""Queries in a tile. From 64 to 192 the time differs by less than a tenth; longer tiles compute more that is masked."""

KEPT_KEYS = 1280
"""Segments with up to this many keys keep their probabilities for backward. That takes at most a fifth of a layer's
activations and saves a quarter of its attention's time. Longer ones recompute them, so memory is linear in length."""

LIKE = 0.8
"""A segment shorter than this share of the longest in its stack starts a new stack."""


class Stack:
    """Segments of similar length and the same offset, padded on the right to the longest.

    The padding needs no mask: padded keys come after every real query, and the outputs of padded queries are dropped.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.offset = segments[0].offset
        self.queries = max(s.queries for s in segments)
        self.keys = self.queries + self.offset
        tail = torch.arange(self.queries)
        starts = torch.tensor([s.start for s in segments])
        counts = torch.tensor([s.queries for s in segments])
        real = tail < counts[:, None]
        query_index = (starts[:, None] + tail).where(real, starts[:, None])
        heads = [[place for part in s.keys for place in part][: self.offset] for s in segments]
        before = torch.tensor(heads, dtype=torch.int64).reshape(len(segments), self.offset)
        self.segments = len(segments)
        self.real = real.reshape(-1)
        """``[segments * queries]`` bool: false where padded."""
        self.query_index = query_index.reshape(-1)
        """``[segments * queries]``: positions in the row; padding points at its segment's first query."""
        self.key_index = torch.cat([before, query_index], 1).reshape(-1)
        self.real_keys = torch.cat([torch.ones(len(segments), self.offset, dtype=torch.bool), real], 1).reshape(-1)


def stacks(layout: BottleneckLayout) -> list[Stack]:
    """The layout's segments by offset and length."""
    made: list[Stack] = []
    ordered = sorted(layout.segments, key=lambda s: (s.offset, -s.queries))
    members: list[Segment] = []
    for segment in ordered:
        if members and (segment.offset != members[0].offset or segment.queries < LIKE * members[0].queries):
            made.append(Stack(members))
            members = []
        members.append(segment)
    if members:
        made.append(Stack(members))
    return made


def _tiles(stack: Stack, window: int | None) -> list[tuple[int, int, int, int]]:
    """First and last query of each tile, and the first and last key that any of them sees."""
    # two tiles of 70 cost more than one of 140
    count = max(1, round(stack.queries / TILE))
    size = -(-stack.queries // count)
    made = []
    for first in range(0, stack.queries, size):
        last = min(first + size, stack.queries)
        low = 0 if window is None else max(0, stack.offset + first - window + 1)
        made.append((first, last, low, stack.offset + last))
    return made


def kept_probabilities(layout: BottleneckLayout, window: int | None = None) -> int:
    """How many probabilities of a row are kept for backward, for each query head."""
    return sum(
        stack.segments * (last - first) * (high - low)
        for stack in stacks(layout)
        if stack.keys <= KEPT_KEYS
        for first, last, low, high in _tiles(stack, window)
    )


def _hide(scores: Tensor, tile: tuple[int, int, int, int], stack: Stack, window: int | None) -> None:
    """Set scores of keys that a query must not see to minus infinity. `scores`: ``[n, groups, queries, keys]``."""
    first, last, low, high = tile
    at = torch.arange(first, last)[:, None] + stack.offset - torch.arange(low, high)[None, :]  # how far back a key is
    hidden = at < 0 if window is None else (at < 0) | (at >= window)
    # without a window only the diagonal block has anything to hide
    column = 0 if window is not None else stack.offset + first - low
    bias = torch.zeros(hidden[:, column:].shape, dtype=scores.dtype).masked_fill_(hidden[:, column:], float("-inf"))
    scores[..., column:] += bias


def _probabilities(
    query: Tensor, key: Tensor, tile: tuple[int, int, int, int], stack: Stack, window: int | None
) -> Tensor:
    """``[n, groups * queries, keys]`` of a tile, in the dtype of the inputs. `query` is already scaled."""
    first, last, low, high = tile
    n, groups, _, dim = query.shape
    scores = torch.bmm(query[:, :, first:last].reshape(n, -1, dim), key[:, low:high].transpose(1, 2))
    _hide(scores.view(n, groups, last - first, high - low), tile, stack, window)
    return scores.softmax(-1)


def _gather(rows: Tensor, index: Tensor, segments: int, kv_heads: int) -> Tensor:
    """``[segments * kv_heads, groups, length, dim]`` of packed ``[tokens, heads, dim]``."""
    dim = rows.shape[2]
    taken = rows.index_select(0, index).view(segments, -1, kv_heads, rows.shape[1] // kv_heads, dim)
    return taken.permute(0, 2, 3, 1, 4).reshape(segments * kv_heads, -1, taken.shape[1], dim)


def _rows(stacked: Tensor, segments: int, heads: int) -> Tensor:
    """The reverse of `_gather`: ``[segments * length, heads, dim]``."""
    length, dim = stacked.shape[-2:]
    return stacked.view(segments, heads, length, dim).transpose(1, 2).reshape(segments * length, heads, dim)


class _CausalTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, made: list[Stack], scale: float, window: int | None
    ) -> Tensor:
        output = torch.empty_like(query)
        kept: list[Tensor] = []
        keep = any(ctx.needs_input_grad[:3])
        for stack in made:
            q = _gather(query, stack.query_index, stack.segments, key.shape[1]) * scale
            k = _gather(key, stack.key_index, stack.segments, key.shape[1])[:, 0]
            v = _gather(value, stack.key_index, stack.segments, key.shape[1])[:, 0]
            result = torch.empty_like(q)
            for tile in _tiles(stack, window):
                first, last, low, high = tile
                p = _probabilities(q, k, tile, stack, window)
                result[:, :, first:last] = torch.bmm(p, v[:, low:high]).view(*q.shape[:2], last - first, -1)
                if keep and stack.keys <= KEPT_KEYS:
                    kept.append(p)
            rows = _rows(result, stack.segments, query.shape[1])
            output[stack.query_index[stack.real]] = rows[stack.real]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.made, ctx.scale, ctx.window = made, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        kv_heads = key.shape[1]
        grad_query = torch.empty_like(query)
        # the keys of the bottleneck and the sink get gradients from two segments, long segments from every tile:
        # if summed in bfloat16, the later ones would be rounded away
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros(key.shape, dtype=wide) for _ in range(2))
        remaining = iter(kept)
        for stack in ctx.made:
            q = _gather(query, stack.query_index, stack.segments, kv_heads) * ctx.scale
            k = _gather(key, stack.key_index, stack.segments, kv_heads)[:, 0]
            v = _gather(value, stack.key_index, stack.segments, kv_heads)[:, 0]
            g = _gather(grads[0], stack.query_index, stack.segments, kv_heads)
            g *= stack.real.view(stack.segments, 1, -1, 1).repeat_interleave(kv_heads, 0)  # padding has no gradient
            dq, dk, dv = torch.empty_like(q), torch.zeros(k.shape, dtype=wide), torch.zeros(k.shape, dtype=wide)
            for tile in _tiles(stack, ctx.window):
                first, last, low, high = tile
                p = next(remaining) if stack.keys <= KEPT_KEYS else _probabilities(q, k, tile, stack, ctx.window)
                part = g[:, :, first:last].reshape(len(g), -1, g.shape[-1])
                dv[:, low:high] += torch.bmm(p.transpose(1, 2), part)
                dp = torch.bmm(part, v[:, low:high].transpose(1, 2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dq[:, :, first:last] = torch.bmm(ds, k[:, low:high]).view(*q.shape[:2], last - first, -1)
                dk[:, low:high] += torch.bmm(ds.transpose(1, 2), q[:, :, first:last].reshape(part.shape))
            rows = _rows(dq.mul_(ctx.scale), stack.segments, query.shape[1])
            grad_query[stack.query_index[stack.real]] = rows[stack.real]
            places = stack.key_index[stack.real_keys]
            for total, share in ((grad_key, dk), (grad_value, dv)):
                total.index_add_(0, places, _rows(share, stack.segments, kv_heads)[stack.real_keys])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def causal_tiles(
    query: Tensor, key: Tensor, value: Tensor, layout: BottleneckLayout, scale: float, window: int | None
) -> Tensor:
    """Attention of packed rows on a CPU; see `bottleneck_attention` for shapes."""
    if "stacks" not in layout.prepared:
        layout.prepared["stacks"] = stacks(layout)
    result: Tensor = _CausalTiles.apply(query, key, value, layout.prepared["stacks"], scale, window)
    return result
