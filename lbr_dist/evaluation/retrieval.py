"""Exact search, BM25 and retrieval metrics. Independent of any model: works on vectors, texts and identifiers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lbr_dist.errors import DataError

Run = dict[str, list[tuple[str, float]]]
"""Query id -> (document id, score), best first."""

MEASURES = ("ndcg@10", "recall@10", "recall@100", "mrr@10")

_QUERY_BLOCK = 256
_LOW_BITS = (1 << 32) - 1


def exact_search(queries: Tensor, documents: Tensor, k: int, block: int = 16384) -> tuple[Tensor, Tensor]:
    """The k documents with the largest inner product with each query (cosine similarity, if vectors have unit norm).

    Args:
        queries: [q, d], float32; the search runs on their device.
        documents: [n, d], any float dtype and device; one block at a time is moved and cast.
        k: how many to return; all documents if there are fewer.
        block: documents scored at a time; memory is in the order of 256 x block, never q x n.

    Returns:
        scores [q, k] float32 and indices [q, k] int64, best first; equal scores are in order of index.

    Raises:
        DataError: if the shapes don't agree, or a vector contains NaN or infinity.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise DataError(
            f"exact_search: found queries {list(queries.shape)} and documents {list(documents.shape)}, "
            "expected [q, d] and [n, d] with the same d. Encode both with the same model."
        )
    if k < 1 or block < 1:
        raise ValueError(f"k and block: found {k} and {block}, expected one or more")
    blocks = (documents[start : start + block] for start in range(0, documents.shape[0], block))
    return search_blocks(queries, blocks, k)


def search_blocks(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`exact_search` over documents that come in blocks, so that they need not be in memory together.

    Args:
        queries: [q, d]; the search runs on their device.
        blocks: [b, d] each, in order; indices count through all of them.
        k: how many to return.
    """
    queries = _finite(queries.float(), "query")
    best = torch.full((queries.shape[0], 0), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for block in blocks:
        part = _finite(block.to(queries.device, torch.float32), "document")
        width = min(k, best.shape[1] + len(part))
        merged = [best.new_zeros(0, width)]
        for first in range(0, queries.shape[0], _QUERY_BLOCK):
            rows = slice(first, first + _QUERY_BLOCK)
            keys = torch.cat([best[rows], _sort_keys(queries[rows] @ part.T, start)], dim=1)
            merged.append(keys.topk(width, dim=1).values)
        best = torch.cat(merged)
        start += len(part)
    return _scores_of(best), _LOW_BITS - (best & _LOW_BITS)


def _finite(vectors: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(vectors).all()):
        raise DataError(
            f"exact_search: found NaN or infinity in the {name} vectors, expected finite numbers. "
            "The model that produced them has diverged; look at its metrics.jsonl."
        )
    return vectors


def _sort_keys(scores: Tensor, first_index: int) -> Tensor:
    """float32 scores [q, b] as int64 keys: the score in the high bits, the reversed index in the low bits.

    topk does not specify which of two equal values it returns. Keys are never equal, so the order is defined on every
    device.
    """
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 turns -0.0, whose bits differ, into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    indices = torch.arange(first_index, first_index + scores.shape[1], device=scores.device)
    return (ordered << 32) + (_LOW_BITS - indices)


def _scores_of(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).to(torch.int32)
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def bm25_search(
    query_texts: Sequence[str],
    document_texts: Sequence[str],
    k: int,
    tokens: Literal["words", "characters"] = "words",
) -> tuple[Tensor, Tensor]:
    r"""BM25 with k1 = 1.5 and b = 0.75 in Lucene's variant (no stemming, no stop words), by bm25s.

    Args:
        query_texts: q texts.
        document_texts: n texts.
        k: how many to return; all documents if there are fewer.
        tokens: `words` are lower-cased runs of `\w`; `characters` are the 3-grams of the lower-cased text.

    Returns:
        scores [q, k] float32 and indices [q, k] int64, as from `exact_search`. A document that shares no token with
        the query is not found: its score is -inf, and `to_run` leaves it out.
    """
    if k < 1:
        raise ValueError(f"k: found {k}, expected one or more")
    k = min(k, len(document_texts))
    scores = np.zeros((len(query_texts), k), dtype=np.float32)
    indices = np.zeros((len(query_texts), k), dtype=np.int64)
    if k:
        index = Bm25(document_texts, tokens)
        for row, text in enumerate(query_texts):
            scores[row], indices[row] = best_positive(index.scores(text), k)
    return torch.from_numpy(scores), torch.from_numpy(indices)


class Bm25:
    """The index behind `bm25_search`; takes the same arguments."""

    def __init__(self, document_texts: Sequence[str], tokens: Literal["words", "characters"] = "words") -> None:
        import bm25s  # type: ignore[import-untyped]

        self._count, self._tokens, self._index = len(document_texts), tokens, None
        tokenized = [_tokenize(text, tokens) for text in document_texts]
        if any(tokenized):
            self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
            self._index.index(tokenized, show_progress=False)

    def scores(self, query_text: str) -> npt.NDArray[np.float32]:
        """[n], the score of every document; 0 if it shares no token with the query."""
        words = _tokenize(query_text, self._tokens)
        if self._index is None or not words:
            return np.zeros(self._count, np.float32)
        return np.asarray(self._index.get_scores(words), np.float32)


def _tokenize(text: str, tokens: Literal["words", "characters"]) -> list[str]:
    text = text.lower()
    if tokens == "words":
        return re.findall(r"\w+", text)
    # a text of one or two characters is a single token, else it could never be found
    return [text[i : i + 3] for i in range(len(text) - 2)] or ([text] if text else [])


def best_positive(all_scores: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The k best of [n] scores, best first, ties by lower index; scores that aren't positive come last, as -inf."""
    all_scores = np.where(all_scores > 0, all_scores, -np.inf).astype(np.float32)
    kth = np.partition(all_scores, len(all_scores) - k)[len(all_scores) - k]
    candidates = np.flatnonzero(all_scores >= kth)
    order = candidates[np.argsort(-all_scores[candidates], kind="stable")[:k]]
    return all_scores[order], order


def to_run(query_ids: Sequence[str], document_ids: Sequence[str], scores: Tensor, indices: Tensor) -> Run:
    """A search result ([q, k] scores and indices) with identifiers, without the documents whose score is -inf."""
    return {
        query_id: [(document_ids[i], s) for s, i in zip(row_scores, row_indices, strict=True) if s > -math.inf]
        for query_id, row_scores, row_indices in zip(query_ids, scores.tolist(), indices.tolist(), strict=True)
    }


# ---- files ----------------------------------------------------------------------------------------------------


def trec_names(names: Iterable[str]) -> dict[str, str]:
    """How each id is written in TREC files, whose fields end at white space.

    As it is; but if an id of the collection has white space, that and every `%` are percent-encoded in all of them, so
    that no two become the same and `urllib.parse.unquote` restores them.
    """
    names = list(names)
    if all(len(name.split()) == 1 and name == name.strip() for name in names):
        return {name: name for name in names}
    return {name: re.sub(r"[\s%]", lambda found: quote(found[0], safe=""), name) for name in names}


def write_trec_run(path: Path, run: Run, tag: str, names: Mapping[str, str] | None = None) -> None:
    """Write lines of `query Q0 document rank score tag`; scores keep all digits of a float32.

    trec_eval sorts by score again and breaks ties by document id, so it may reorder tied documents. `names` says how
    ids are written, if not as they are; see `trec_names`.
    """
    names = names or {}
    lines = (
        f"{_field(names.get(query, query))} Q0 {_field(names.get(document, document))} {rank} {score:.9g} "
        f"{_field(tag)}\n"
        for query, ranked in run.items()
        for rank, (document, score) in enumerate(ranked, start=1)
    )
    _write(path, lines)


def write_qrels(path: Path, qrels: Mapping[str, set[str]], names: Mapping[str, str] | None = None) -> None:
    """Write a line `query 0 document 1` for each relevant document, in sorted order; `names` as in `write_trec_run`."""
    names = names or {}
    pairs = ((q, d) for q, relevant in qrels.items() for d in sorted(relevant))
    _write(path, (f"{_field(names.get(q, q))} 0 {_field(names.get(d, d))} 1\n" for q, d in pairs))


def _field(name: str) -> str:
    if not name or len(name.split()) != 1 or name != name.strip():
        raise DataError(f"id {name!r}: found white space or nothing, expected one word. TREC files can't hold others.")
    return name


def _write(path: Path, lines: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


# ---- measures -------------------------------------------------------------------------------------------------


def per_query_values(run: Run, qrels: Mapping[str, set[str]]) -> dict[str, list[float]]:
    """Each of `MEASURES` for every judged query, in the order of `qrels`.

    Relevance is binary. nDCG is trec_eval's `ndcg_cut`: the sum of gain / log2(rank + 1), divided by that of an ideal
    ranking cut at 10. A query that the run lacks counts as zero; one without a relevant document is left out.
    """
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for query, relevant in qrels.items():
        if not relevant:
            continue
        ranked = [document for document, _ in run.get(query, [])]
        if len(set(ranked[:100])) < len(ranked[:100]):
            raise DataError(
                f"run, query {query!r}: found a document twice, expected each once. Merge duplicates first."
            )
        ranks = [rank for rank, document in enumerate(ranked[:100], start=1) if document in relevant]
        ranks_10 = [rank for rank in ranks if rank <= 10]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(10, len(relevant)) + 1))
        values["ndcg@10"].append(sum(1 / math.log2(rank + 1) for rank in ranks_10) / ideal)
        values["recall@10"].append(len(ranks_10) / len(relevant))
        values["recall@100"].append(len(ranks) / len(relevant))
        values["mrr@10"].append(1 / ranks_10[0] if ranks_10 else 0.0)
    if not values["ndcg@10"]:
        raise DataError("qrels: found no query with a relevant document, expected at least one. Check the test split.")
    return values


def score_run(run: Run, qrels: Mapping[str, set[str]], bootstrap: int, seed: int) -> dict[str, float | list[float]]:
    """Means of `per_query_values`, and under `NAME_interval` their 95 % percentile bootstrap over queries."""
    values = per_query_values(run, qrels)
    means = _resampled_means(np.array([values[name] for name in MEASURES]), bootstrap, seed)
    result: dict[str, float | list[float]] = {}
    for name, resampled in zip(MEASURES, means, strict=True):
        result[name] = float(np.mean(values[name]))
        result[f"{name}_interval"] = _interval(resampled)
    return result


def paired_bootstrap(
    a_values: Sequence[float], b_values: Sequence[float], resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of a - b over the same queries, and its 95 % percentile bootstrap interval: (difference, low, high)."""
    if len(a_values) != len(b_values) or not a_values:
        raise ValueError(
            f"paired_bootstrap: found {len(a_values)} and {len(b_values)} values, expected the same number of each"
        )
    differences = np.asarray(a_values, np.float64) - np.asarray(b_values, np.float64)
    low, high = _interval(_resampled_means(differences[None], resamples, seed)[0])
    return float(differences.mean()), low, high


def _resampled_means(values: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """[measures, queries] -> [measures, resamples]; all measures see the same resamples."""
    generator = np.random.default_rng(seed)
    count = values.shape[1]
    means = [values[:, generator.integers(0, count, count)].mean(axis=1) for _ in range(resamples)]
    return np.stack(means, axis=1)


def _interval(resampled: npt.NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [float(low), float(high)]
