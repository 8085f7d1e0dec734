"""InfoNCE of queries against all documents of the global batch, without the matrix of their similarities.

Forward, one tile of ``queries x documents`` at a time: normalise both blocks, multiply, mask what is not a negative,
and fold the tile into each query's running maximum and running sum of exponentials (Milakov and Gimelshein 2018,
arXiv 1805.02867). Backward recomputes every tile, turns it into probabilities in place with the log-sum-exp, and adds
its two products to the gradients. That is four matrix products where the dense loss needs three, and nothing of size
``queries x documents`` is ever in memory. False negatives are a short list of columns for each query.

`reference_info_nce` is the dense definition. The two passes are in `infonce_tiles.py` as plain PyTorch and in
`infonce_triton.py` as GPU kernels; what they share is here.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lbr_dist.kernels.infonce_tiles import TILE, Problem, tile_gradients, tile_statistics

EPS = 1e-12
"""Smaller norms are clamped to this, as in `F.normalize`."""

Backend = Literal["auto", "reference", "tiles", "triton"]


class InfoNCE(NamedTuple):
    """The loss of a batch and two counts for the log."""

    loss: Tensor
    """Scalar, float32, differentiable: the sum over the queries."""

    correct: Tensor
    """Scalar, int64: queries whose positive scores higher than everything that isn't masked."""

    masked: Tensor
    """Scalar, int64: (query, document) entries that were masked as false negatives."""


# ---- which columns are not negatives of a query


def _ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges ``starts[i] .. starts[i] + counts[i]``, concatenated: the owner i and the value of each element."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    inside = torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]
    return owner, starts[owner] + inside


def _join(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (i, j) with ``left[i] == right[j]``, sorted by i."""
    ordered, order = right.sort()
    starts = torch.searchsorted(ordered, left)
    owner, place = _ranges(starts, torch.searchsorted(ordered, left, right=True) - starts)
    return owner, order[place]


def _padded(rows: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    """Pairs (row, column), sorted by row, as a matrix of columns padded with -1, without each row's `own` column."""
    others = columns != own[rows]
    rows, columns = rows[others], columns[others]
    counts = torch.bincount(rows, minlength=len(own))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max()) if len(own) else 0
    return columns.new_full((len(own), width), -1).index_put_((rows, place), columns)


def excluded_columns(
    positives: Tensor,
    documents: int,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Each query's known positives other than the scored one, by sorted joins; nothing of size ``q x n`` is built.

    Args:
        positives: ``[q, p]`` int64 columns, padded with -1; column 0 is scored.
        documents: the number of documents.
        query_ids: ``[q]`` int64; queries with the same id share their positives.
        document_ids: ``[documents]`` int64; documents with the same id are positives of the same queries.
        transposed: return, for each query's scored document, the other queries that it is a known positive of.

    Returns:
        ``[q, e]`` int64 columns (rows if transposed), padded with -1, in no particular order, without duplicates.
    """
    queries = torch.arange(len(positives), device=positives.device)
    columns = torch.arange(documents, device=positives.device)
    group = queries if query_ids is None else torch.unique(query_ids, return_inverse=True)[1]
    key = columns if document_ids is None else torch.unique(document_ids, return_inverse=True)[1]
    row, slot = (positives >= 0).nonzero(as_tuple=True)
    links = torch.unique(group[row] * max(documents, 1) + key[positives[row, slot]])
    link_group, link_key = links // max(documents, 1), links % max(documents, 1)
    scored = positives[:, 0]
    if transposed:
        row, link = _join(key[scored], link_key)
        owner, found = _join(link_group[link], group)
        return _padded(row[owner], found, queries)
    row, link = _join(group, link_group)
    owner, found = _join(link_key[link], key)
    return _padded(row[owner], found, scored)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 in float32, whatever the process allows otherwise: no tf32, no bfloat16."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


# ---- the dense definition


def _known(positives: Tensor, documents: int, query_ids: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """``[q, documents]`` bool: the known positives of each query, including the scored one."""
    key = torch.arange(documents, device=positives.device) if document_ids is None else document_ids
    same = key == key[positives.clamp_min(0)][:, :, None]  # [q, p, documents]
    known = (same & (positives >= 0)[:, :, None]).any(1)
    if query_ids is not None:
        same_query = query_ids[:, None] == query_ids
        known = (same_query.double() @ known.double()).bool()
    return known


def _dense(
    anchors: Tensor, candidates: Tensor, own: Tensor, known: Tensor, temperature: float | Tensor, margin: float | None
) -> InfoNCE:
    scores = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T
    positive = scores.detach().gather(1, own[:, None])
    masked = known if margin is None else known | (scores.detach() > positive + margin)
    masked = masked.scatter(1, own[:, None], False)
    losses = F.cross_entropy((scores / temperature).masked_fill(masked, -math.inf), own, reduction="none")
    others = masked.scatter(1, own[:, None], True)
    correct = (scores.detach().masked_fill(others, -math.inf) < positive).all(1)
    return InfoNCE(losses.sum(), correct.sum(), masked.sum())


def reference_info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    prefixes: Sequence[int] | None = None,
) -> InfoNCE:
    """The definition: dense matrices in float32 (float64 for float64). Same arguments and results as `info_nce`."""
    _checked(temperature)
    positives = positives[:, None] if positives.ndim == 1 else positives
    known, scored = _known(positives, len(documents), query_ids, document_ids), positives[:, 0]
    results, rows = [], torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False), _full_precision():
        for width in _widths(prefixes, queries):
            q, d = (x[:, :width].to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, documents))
            result = _dense(q, d, scored, known, temperature, margin)
            if symmetric:
                back = _dense(d[scored], q, rows, known[:, scored].T, temperature, margin)
                result = result._replace(loss=(result.loss + back.loss) / 2)
            results.append(result)
    return _mean(results)


# ---- what the backends share: norms, the positive's score, and the backward pass through both


def _inverse_norms(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return norms.clamp_min_(EPS).reciprocal_()


def _through_norm_(gradient: Tensor, rows: Tensor, inverse: Tensor, factor: Tensor, tile: int) -> Tensor:
    """Turn the gradient of the normalised rows into ``factor`` times that of the rows, in place, a block at a time.

    Returns the sum over the rows of <normalised row, its gradient>.
    """
    along = gradient.new_zeros(())
    for start in range(0, len(rows), tile):
        part = slice(start, start + tile)
        unit = rows[part].to(gradient.dtype) * inverse[part, None]
        shares = (gradient[part] * unit).sum(1)
        along += shares.sum()
        # a clamped norm is a constant
        shares *= inverse[part] < 1 / EPS
        gradient[part].addcmul_(unit, shares[:, None], value=-1).mul_((inverse[part] * factor)[:, None])
    return along


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        temperature: Tensor | None,
        value: float,
        positives: Tensor,
        excluded: Tensor,
        margin: float | None,
        tile: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_queries, of_documents = _inverse_norms(queries), _inverse_norms(documents)
        positive = torch.empty_like(of_queries)
        for start in range(0, len(queries), tile):
            part = slice(start, start + tile)
            chosen = positives[part]
            dots = (queries[part].to(positive.dtype) * documents[chosen].to(positive.dtype)).sum(1)
            positive[part] = dots * of_queries[part] * of_documents[chosen] / value
        limits = None if margin is None else positive + margin / value
        problem = Problem(queries, documents, of_queries / value, of_documents, positives, excluded, limits, tile)
        with _full_precision():
            top, others, above = _passes(backend)[0](problem)
        # log(1 + exp(others - positive)) keeps its digits where the loss is small
        losses = torch.logaddexp(others - positive, torch.zeros_like(positive))
        saved = (queries, documents, of_queries, of_documents, positives, excluded, limits)
        ctx.save_for_backward(*saved, positive + losses, -(others - positive).sigmoid(), temperature)
        ctx.value, ctx.tile, ctx.backend = value, tile, backend
        correct, masked = (top < positive).sum(), (excluded >= 0).sum() + above
        ctx.mark_non_differentiable(correct, masked)
        return losses.sum(), correct, masked

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, of_queries, of_documents, positives, excluded, limits, *rest = ctx.saved_tensors
        logsumexp, pull, temperature = rest
        wants_queries, wants_documents, wants_temperature = ctx.needs_input_grad[:3]
        problem = Problem(
            queries, documents, of_queries / ctx.value, of_documents, positives, excluded, limits, ctx.tile
        )
        wants = wants_queries or wants_temperature, wants_documents
        with _full_precision():
            grad_queries, grad_documents = _passes(ctx.backend)[1](problem, logsumexp, pull, *wants, ctx.value)
        grad_temperature = None
        if grad_queries is not None:
            along = _through_norm_(grad_queries, queries, of_queries, grads[0], ctx.tile)
            if wants_temperature:  # scores are <unit query, unit document> / temperature
                grad_temperature = (grads[0] * along / -ctx.value).to(temperature)
            grad_queries = grad_queries.to(queries.dtype) if wants_queries else None
        if grad_documents is not None:
            _through_norm_(grad_documents, documents, of_documents, grads[0], ctx.tile)
            grad_documents = grad_documents.to(documents.dtype)
        return grad_queries, grad_documents, grad_temperature, *[None] * 6


def _passes(backend: str) -> tuple[Any, Any]:
    if backend == "triton":
        from lbr_dist.kernels import infonce_triton

        return infonce_triton.triton_statistics, infonce_triton.triton_gradients
    return tile_statistics, tile_gradients


def backend_for(backend: str, queries: Tensor) -> str:
    """The backend to run. Raises ValueError with the reason if one that was asked for by name can't run."""
    if backend not in ("auto", "reference", "tiles", "triton"):
        raise ValueError(f"backend: found {backend!r}, expected auto, reference, tiles or triton")
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if queries.is_cuda and has_triton else "tiles"
    if backend == "triton":
        if not has_triton:
            raise ValueError("backend 'triton' needs the package triton, which isn't installed; use 'auto' or 'tiles'")
        if not queries.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' needs CUDA, found tensors on {queries.device}; use 'auto' or 'tiles' "
                "(TRITON_INTERPRET=1, set before Triton is imported, runs it on the CPU for tests)"
            )
    return backend


def _checked(temperature: float | Tensor) -> float:
    value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"temperature: found {value}, expected a positive finite number")
    return value


def _widths(prefixes: Sequence[int] | None, queries: Tensor) -> Sequence[int]:
    """The widths of the prefixes in ascending order."""
    width = queries.shape[1]
    wrong = [m for m in prefixes or () if not 1 <= m <= width]
    if wrong:
        raise ValueError(f"prefixes: found {wrong[0]}, expected widths from 1 to the embedding's {width}")
    return sorted(prefixes or [width])


def _mean(results: list[InfoNCE]) -> InfoNCE:
    """The mean loss of all prefixes, and the counts of the last, widest one."""
    if len(results) == 1:
        return results[0]
    return results[-1]._replace(loss=torch.stack([result.loss for result in results]).mean())


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    prefixes: Sequence[int] | None = None,
    tile: int = TILE,
    backend: Backend = "auto",
) -> InfoNCE:
    """Sum over the queries of ``-log softmax(cosine(query, documents) / temperature)[positive]``, and counts.

    A document is masked, that is left out of query i's sum, if it is another positive of i, has the document id of any
    positive of i, is either of these for another query with i's query id, or is more similar to i than i's positive by
    more than `margin`. Query i's scored positive is never masked. Hard negatives are additional rows of `documents`.

    Args:
        queries: ``[q, d]``, this rank's rows, not normalised; float32, bfloat16 or float16. Similarities, sums and the
            gradients' sums are float32 (float64 for float64).
        documents: ``[n, d]``, every document of the global batch, not normalised, in one of these dtypes.
        positives: ``[q]`` int64, the column of each query's positive; or ``[q, p]``, padded with -1: column 0 is
            scored, the others are further known positives. Queries may share a positive.
        temperature: divides the similarities; a 0-dim tensor gets a gradient.
        query_ids: ``[q]`` int64, or None if all queries are different.
        document_ids: ``[n]`` int64, or None if all documents are different.
        margin: a document whose cosine is above the positive's by more than this is treated as a false negative; it
            has no gradient.
        symmetric: average this loss with that of ``documents[positives]`` against all of `queries`, in which the other
            queries that a document is a known positive of are masked. Counts are those of the first direction.
        prefixes: Matryoshka widths (Kusupati et al. 2022, arXiv 2205.13147): the mean of the losses of ``[:, :m]``,
            each normalised separately. Counts are those of the largest. (The gradients of 16-bit rows are rounded for
            each width and direction before they are summed.)
        tile: queries and documents whose scores are in memory at a time (`triton` has its own).
        backend: `triton` needs CUDA; `auto` uses it if possible, and `tiles` otherwise.

    Raises:
        ValueError: the temperature isn't positive and finite, a prefix isn't within the width, or the backend can't run
            here.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4.
    """
    backend_name, value = backend_for(backend, queries), _checked(temperature)
    if backend_name == "reference":
        return reference_info_nce(
            queries,
            documents,
            positives,
            temperature=temperature,
            query_ids=query_ids,
            document_ids=document_ids,
            margin=margin,
            symmetric=symmetric,
            prefixes=prefixes,
        )
    positives = positives[:, None] if positives.ndim == 1 else positives
    scored = positives[:, 0].contiguous()
    rows = torch.arange(len(queries), device=queries.device)
    divisor = temperature if isinstance(temperature, Tensor) else None

    def directed(anchors: Tensor, candidates: Tensor, own: Tensor, excluded: Tensor) -> InfoNCE:
        arguments = (anchors, candidates, divisor, value, own, excluded, margin, tile, backend_name)
        return InfoNCE(*_InfoNCE.apply(*arguments))  # type: ignore[no-untyped-call]

    known = (positives, len(documents), query_ids, document_ids)
    excluded = excluded_columns(*known)
    transposed = excluded_columns(*known, transposed=True) if symmetric else excluded
    results = []
    for width in _widths(prefixes, queries):
        q, d = (x[:, :width] for x in (queries, documents))
        result = directed(q, d, scored, excluded)
        if symmetric:
            result = result._replace(loss=(result.loss + directed(d[scored], q, rows, transposed).loss) / 2)
        results.append(result)
    return _mean(results)
