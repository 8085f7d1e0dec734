"""InfoNCE as GPU kernels; see `infonce.py` for the loss and `infonce_tiles.py` for the same passes in plain PyTorch.

Forward is one kernel: a program holds the running maximum and sum of a block of queries over one share of the
documents. Backward writes the weights (gradients of the scores) of a panel of `PANEL` queries and documents to a
scratch matrix, and multiplies them from there into the gradients of both sides. So nothing is computed twice, even if a
gradient is wider than a program's registers: four products in total at any d, at the cost of moving each weight through
memory once (at d = 4,096, two bytes for 16,384 operations in bfloat16).

bfloat16 and float16 rows enter the products as they are, with float32 accumulation, and the norms are applied to the
products. With bfloat16 rows the weights are bfloat16; with float16 rows they are rounded to tf32, since float16 has no
room for small ones. float32 is multiplied in float32. Each excluded column costs one comparison per score, next to d
multiply-adds.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found]
import triton.language as tl  # type: ignore[import-untyped, import-not-found]
from torch import Tensor

from lbr_dist.kernels.infonce_tiles import Problem

PANEL = 8192
"""Queries and documents whose weights are in memory at a time: 128 MiB in bfloat16, 256 MiB in float32."""

BLOCK = 128
"""Queries and documents in a program's block."""

PROGRAMS = 512
"""Programs that forward is split into, if possible: a few for each multiprocessor of a GPU."""


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    queries, documents, query_scale, document_scale, positives, excluded, limits, rows, columns, q, n,
    width: tl.constexpr, query_stride, document_stride, num_excluded, LIMITED: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scaled scores of a block, minus infinity where left out, and how many of each row were above the limit."""
    products = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            queries + rows[:, None] * query_stride + inner[None, :],
            mask=(rows[:, None] < q) & (inner[None, :] < width), other=0.0,
        )  # fmt: skip
        right = tl.load(
            documents + columns[None, :] * document_stride + inner[:, None],
            mask=(columns[None, :] < n) & (inner[:, None] < width), other=0.0,
        )  # fmt: skip
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision=PRECISION)
    left_scale = tl.load(query_scale + rows, mask=rows < q, other=0.0)
    right_scale = tl.load(document_scale + columns, mask=columns < n, other=0.0)
    scores = products * left_scale[:, None] * right_scale[None, :]
    positive = tl.load(positives + rows, mask=rows < q, other=-1)
    scores = tl.where((columns[None, :] >= n) | (columns[None, :] == positive[:, None]), float("-inf"), scores)
    for slot in range(num_excluded):
        column = tl.load(excluded + rows * num_excluded + slot, mask=rows < q, other=-1)
        scores = tl.where(columns[None, :] == column[:, None], float("-inf"), scores)
    count = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    if LIMITED:
        limit = tl.load(limits + rows, mask=rows < q, other=0.0)
        count = tl.sum((scores > limit[:, None]).to(tl.int32), 1)
        scores = tl.where(scores > limit[:, None], float("-inf"), scores)
    return scores, count


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    queries, documents, query_scale, document_scale, positives, excluded, limits, tops, totals, counts, q, n,
    width: tl.constexpr, query_stride, document_stride, num_excluded, share, LIMITED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of a block of queries over one share of the documents: ``[shares, q]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    begin = tl.program_id(1).to(tl.int64) * share
    # not minus infinity, which would give nan for a block with everything left out
    top = tl.full((BLOCK_Q,), -3.0e38, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    count = tl.zeros((BLOCK_Q,), dtype=tl.int32)
    for offset in range(0, share, BLOCK_N):
        columns = begin + offset + tl.arange(0, BLOCK_N)
        scores, above = _scores(
            queries, documents, query_scale, document_scale, positives, excluded, limits, rows, columns, q, n,
            width, query_stride, document_stride, num_excluded, LIMITED, WIDEN, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        high = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - high) + tl.sum(tl.exp(scores - high[:, None]), 1)
        top = high
        count += above
    place = tl.program_id(1).to(tl.int64) * q + rows
    tl.store(tops + place, top, mask=rows < q)
    tl.store(totals + place, total, mask=rows < q)
    tl.store(counts + place, count, mask=rows < q)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    queries, documents, query_scale, document_scale, positives, excluded, limits, logsumexp, pull, weights,
    first_row, first_column, last_row, last_column, q, n, width: tl.constexpr, query_stride, document_stride,
    num_excluded, LIMITED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of a panel of weights: gradients of the dot products <query, document>, before norms and temperature."""
    rows = first_row + tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = first_column + tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scores, _ = _scores(
        queries, documents, query_scale, document_scale, positives, excluded, limits, rows, columns, q, n,
        width, query_stride, document_stride, num_excluded, LIMITED, WIDEN, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    whole = tl.load(logsumexp + rows, mask=rows < q, other=0.0)
    positive = tl.load(positives + rows, mask=rows < q, other=-1)
    pulled = tl.load(pull + rows, mask=rows < q, other=0.0)
    gradient = tl.where(columns[None, :] == positive[:, None], pulled[:, None], tl.exp(scores - whole[:, None]))
    left_scale = tl.load(query_scale + rows, mask=rows < q, other=0.0)
    right_scale = tl.load(document_scale + columns, mask=columns < n, other=0.0)
    gradient = gradient * left_scale[:, None] * right_scale[None, :]
    place = (rows - first_row)[:, None] * (last_column - first_column) + (columns - first_column)[None, :]
    inside = (rows[:, None] < last_row) & (columns[None, :] < last_column)
    tl.store(weights + place, gradient.to(weights.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _accumulate(  # type: ignore[no-untyped-def]
    gradient, weights, others, scale, length, depth, width: tl.constexpr, row_stride, depth_stride, other_stride,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``gradient[length, width] += weights[length, depth] @ others[depth, width] / scale[:, None]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    sums = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        left = tl.load(
            weights + rows[:, None] * row_stride + inner[None, :] * depth_stride,
            mask=(rows[:, None] < length) & (inner[None, :] < depth), other=0.0,
        )  # fmt: skip
        right = tl.load(
            others + inner[:, None] * other_stride + columns[None, :],
            mask=(inner[:, None] < depth) & (columns[None, :] < width), other=0.0,
        )  # fmt: skip
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    place = gradient + rows[:, None] * width + columns[None, :]
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    divisor = tl.load(scale + rows, mask=rows < length, other=1.0)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + sums / divisor[:, None], mask=inside)


def _settings(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time settings of the kernels for rows of this dtype."""
    # Triton's interpreter multiplies the bits of bfloat16 as integers
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "WIDEN": dtype == torch.float16 or (interpreted and dtype == torch.bfloat16),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": 8,
        "num_stages": 3 if dtype == torch.bfloat16 else 2,
    }


def _depth(dtype: torch.dtype) -> int:
    """Depth of one step of a product: 128 bytes of every row."""
    return 128 // dtype.itemsize


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _contiguous(p: Problem) -> Problem:
    """Make the elements of a row contiguous, as the kernels read them."""
    found = p.queries.dtype, p.documents.dtype
    if found[0] != found[1] or found[0] not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"backend 'triton': found {found[0]} queries and {found[1]} documents, expected both in float32, "
            "bfloat16 or float16; use 'tiles'"
        )
    queries, documents = (x if x.stride(1) == 1 else x.contiguous() for x in (p.queries, p.documents))
    return p._replace(queries=queries, documents=documents, excluded=p.excluded.contiguous())


def _arguments(p: Problem) -> tuple[Any, ...]:
    limits = p.query_scale if p.limits is None else p.limits  # not read if there are no limits
    return p.queries, p.documents, p.query_scale, p.document_scale, p.positives, p.excluded, limits


def _sizes(p: Problem) -> dict[str, Any]:
    return {
        "q": len(p.queries),
        "n": len(p.documents),
        "width": p.queries.shape[1],
        "query_stride": p.queries.stride(0),
        "document_stride": p.documents.stride(0),
        "num_excluded": p.excluded.shape[1],
        "LIMITED": p.limits is not None,
        "BLOCK_Q": BLOCK,
        "BLOCK_N": BLOCK,
        "BLOCK_D": _depth(p.queries.dtype),
    }


def triton_statistics(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as `tile_statistics`."""
    q, n = len(p.queries), len(p.documents)
    p, settings = _contiguous(p), _settings(p.queries.dtype)
    blocks = triton.cdiv(q, BLOCK)
    shares = max(1, min(PROGRAMS // max(blocks, 1), triton.cdiv(n, BLOCK)))
    share = triton.cdiv(triton.cdiv(n, BLOCK), shares) * BLOCK
    shares = triton.cdiv(n, share) if n else 1
    tops, totals = (torch.empty(shares, q, dtype=torch.float32, device=p.queries.device) for _ in range(2))
    counts = torch.zeros(shares, q, dtype=torch.int32, device=p.queries.device)
    if q:
        _statistics[blocks, shares](*_arguments(p), tops, totals, counts, share=share, **_sizes(p), **settings)
    return tops.amax(0), (tops + totals.log()).logsumexp(0), counts.sum()


def triton_gradients(
    p: Problem, logsumexp: Tensor, pull: Tensor, of_queries: bool, of_documents: bool, temperature: float
) -> tuple[Tensor | None, Tensor | None]:
    """Same arguments and results as `tile_gradients`."""
    p, settings = _contiguous(p), _settings(p.queries.dtype)
    (q, width), n, device = p.queries.shape, len(p.documents), p.queries.device
    grad_queries = torch.zeros(q, width, dtype=torch.float32, device=device) if of_queries else None
    grad_documents = torch.zeros(n, width, dtype=torch.float32, device=device) if of_documents else None
    scratch = torch.empty(min(q, PANEL) * min(n, PANEL), dtype=_weight_dtype(p.queries.dtype), device=device)

    def accumulate(gradient: Tensor, weights: Tensor, others: Tensor, scale: Tensor) -> None:
        grid = triton.cdiv(len(gradient), BLOCK), triton.cdiv(width, BLOCK)
        strides = weights.stride(0), weights.stride(1), others.stride(0)
        blocks = {"BLOCK_M": BLOCK, "BLOCK_W": BLOCK, "BLOCK_K": _depth(p.queries.dtype)}
        _accumulate[grid](gradient, weights, others, scale, *weights.shape, width, *strides, **blocks, **settings)

    for start in range(0, q, PANEL):
        for first in range(0, n, PANEL):
            stop, last = min(start + PANEL, q), min(first + PANEL, n)
            weights = scratch[: (stop - start) * (last - first)].view(stop - start, last - first)
            grid = triton.cdiv(stop - start, BLOCK), triton.cdiv(last - first, BLOCK)
            panel = start, first, stop, last
            _weights[grid](*_arguments(p), logsumexp, pull, weights, *panel, **_sizes(p), **settings)
            if grad_queries is not None:
                # query_scale includes 1 / temperature, which stays in the gradient
                scale = p.query_scale[start:stop] * temperature
                accumulate(grad_queries[start:stop], weights, p.documents[first:last], scale)
            if grad_documents is not None:
                scale = p.document_scale[first:last]
                accumulate(grad_documents[first:last], weights.T, p.queries[start:stop], scale)
    return grad_queries, grad_documents
