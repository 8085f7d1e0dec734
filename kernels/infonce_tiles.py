"""InfoNCE over tiles of ``queries x documents`` in plain PyTorch, on any device; see `infonce.py` for the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2048
"""Queries and documents in a tile: 16 MiB of scores. On an idle CPU, 1,024 is as fast as 2,048 and 512 is 3 % slower;
on a busy one, the threads of small tiles wait for one another."""


class Problem(NamedTuple):
    """One direction of the loss, as a backend sees it."""

    queries: Tensor
    documents: Tensor
    query_scale: Tensor
    """``[q]``: 1 / (norm * temperature)."""
    document_scale: Tensor
    """``[n]``: 1 / norm."""
    positives: Tensor
    """``[q]`` int64: the column of each query's positive, whose score the backend leaves out."""
    excluded: Tensor
    """``[q, e]`` int64: further columns to leave out, padded with -1."""
    limits: Tensor | None
    """``[q]``: scores above this are left out."""
    tile: int


def _tiles(p: Problem) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, int]]:
    """Rows, columns, scaled queries and documents, scores (-inf if left out), and how many are above the limit.

    All tiles share their buffers. Products are written with `out`, which autocast leaves in full precision.
    """
    (q, width), n = p.queries.shape, len(p.documents)
    wide, size = p.query_scale.dtype, p.tile
    some, many = min(size, q), min(size, n)
    buffer = p.query_scale.new_empty(some * many)
    query_block, document_block = (p.query_scale.new_empty(length, width) for length in (some, many))
    hidden = torch.cat([p.positives[:, None], p.excluded], 1)
    for start in range(0, q, size):
        rows = slice(start, min(start + size, q))
        left = query_block[: rows.stop - start]
        torch.mul(p.queries[rows].to(wide), p.query_scale[rows, None], out=left)
        for first in range(0, n, size):
            columns = slice(first, min(first + size, n))
            right = document_block[: columns.stop - first]
            torch.mul(p.documents[columns].to(wide), p.document_scale[columns, None], out=right)
            scores = buffer[: len(left) * len(right)].view(len(left), len(right))
            torch.mm(left, right.T, out=scores)
            place = hidden[rows] - first
            row, slot = ((place >= 0) & (place < len(right))).nonzero(as_tuple=True)
            scores[row, place[row, slot]] = -math.inf
            above = 0
            if p.limits is not None:
                over = scores > p.limits[rows, None]
                scores.masked_fill_(over, -math.inf)
                above = int(over.sum())
            yield rows, columns, left, right, scores, above


def tile_statistics(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's largest score and log-sum-exp, ``[q]``, and how many scores were above the limit, int64."""
    # not minus infinity, which would give nan for a tile with everything left out
    top = torch.full_like(p.query_scale, torch.finfo(p.query_scale.dtype).min)
    total, above = torch.zeros_like(top), 0
    for rows, _, _, _, scores, over in _tiles(p):
        high = torch.maximum(top[rows], scores.amax(1))
        sums = scores.sub_(high[:, None]).exp_().sum(1)
        total[rows] = total[rows] * (top[rows] - high).exp_() + sums
        top[rows] = high
        above += over
    return top, top + total.log(), torch.tensor(above, device=top.device)


def tile_gradients(
    p: Problem, logsumexp: Tensor, pull: Tensor, of_queries: bool, of_documents: bool, temperature: float
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the summed loss with respect to the normalised queries and documents.

    Args:
        p: the problem.
        logsumexp: ``[q]``, of all scores, including the positive's.
        pull: ``[q]``, the gradient with respect to the positive's score.
        of_queries, of_documents: which gradients to compute.
        temperature: the scores' divisor, which `query_scale` already includes.
    """
    wide = logsumexp.dtype
    grad_queries = torch.zeros_like(p.queries, dtype=wide) if of_queries else None
    grad_documents = torch.zeros_like(p.documents, dtype=wide) if of_documents else None
    for rows, columns, left, right, scores, _ in _tiles(p):
        weights = scores.sub_(logsumexp[rows, None]).exp_()
        place = p.positives[rows] - columns.start
        row = ((place >= 0) & (place < len(right))).nonzero()[:, 0]
        weights[row, place[row]] = pull[rows][row]
        if grad_queries is not None:
            grad_queries[rows].addmm_(weights, right, alpha=1 / temperature)
        if grad_documents is not None:
            grad_documents[columns].addmm_(weights.T, left)
    return grad_queries, grad_documents
