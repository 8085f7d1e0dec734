"""Attention over packed rows with a bottleneck: the mask, and two ways to apply it.

A row holds several sequences ``[sink x b y]`` one after another. A token attends to the tokens of its own
sequence at or before it, except that a target token never attends to the context: what it knows of ``x`` it
has from the bottleneck ``b`` (and from the sink, which says nothing about ``x``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SINK, CONTEXT, BOTTLENECK, TARGET = range(4)
"""Roles of a token within its sequence."""

# On a CPU, SDPA with a mask takes 1.3 to 2.5 times as long as the plain matrix products, forward and backward, for
# rows up to this long (benchmarks/attention_cpu.py).
DENSE_ROW_TOKENS = 512


def bottleneck_mask(segment_ids: Tensor, roles: Tensor, sliding_window: int | None = None) -> Tensor:
    """Which keys each query may see.

    Args:
        segment_ids: ``[rows, tokens]`` int, the sequence that a token belongs to; -1 is padding.
        roles: ``[rows, tokens]`` int, one of `SINK`, `CONTEXT`, `BOTTLENECK`, `TARGET`.
        sliding_window: a query sees itself and the ``sliding_window - 1`` tokens before it, where given.

    Returns:
        ``[rows, 1, tokens, tokens]`` bool, true where the query (third axis) sees the key (fourth axis).
        Padding sees the padding at or before it, so that no row of the softmax is empty.
    """
    tokens = segment_ids.shape[1]
    index = torch.arange(tokens, device=segment_ids.device)
    distance = index[:, None] - index[None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    hidden = (roles[:, :, None] == TARGET) & (roles[:, None, :] == CONTEXT)
    return (seen & same & ~hidden)[:, None]


def reference_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The plain truth in float32. Same arguments as `masked_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query.float() @ key.transpose(2, 3)) * scale
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).to(query.dtype)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    rows, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    flat = (rows * heads, tokens, head_dim)
    key, value = (x.repeat_interleave(groups, dim=1).reshape(flat) for x in (key, value))
    bias = bias.expand(rows, heads, tokens, tokens).reshape(rows * heads, tokens, tokens)
    scores = torch.baddbmm(bias, (query * scale).reshape(flat), key.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), value).view(rows, heads, tokens, head_dim)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention under an explicit mask, grouped-query heads included.

    Args:
        query: ``[rows, heads, tokens, head_dim]``, any floating dtype.
        key: ``[rows, kv_heads, tokens, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        value: the same shape as `key`.
        mask: ``[rows, 1, tokens, tokens]`` bool, true where a query sees a key.
        scale: the scores' factor.

    Returns:
        ``[rows, heads, tokens, head_dim]`` in the dtype of `query`.
    """
    if query.device.type == "cpu" and query.shape[2] <= DENSE_ROW_TOKENS:
        return _dense(query, key, value, mask, scale)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
