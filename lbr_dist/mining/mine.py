"""Mines hard negatives for training pairs, with a model or BM25: positive-aware, restartable, on any number of ranks.

    score(q, d-) <= margin_percent x score(q, d+)    or    score(q, d-) <= score(q, d+) - margin_absolute

NV-Retriever (arXiv 2407.15831), TopK-PercPos and TopK-MarginPos. Texts are encoded and pairs are searched in units,
each a file in the work folder that is written atomically. A rank has a contiguous share of the units; the first rank
joins them all. Which documents may be negatives at all is in mining/candidates.py, the search in mining/index.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lbr_dist.console import Progress, Say, silent
from lbr_dist.data.records import read_corpus, write_jsonl
from lbr_dist.errors import DataError
from lbr_dist.mining.candidates import REASONS, Candidates
from lbr_dist.mining.index import Ivf, Search, VectorFiles, bm25_search, build_ivf, model_search
from lbr_dist.mining.work import MiningSettings
from lbr_dist.ranks.group import Ranks, meet, share
from lbr_dist.storage.files import atomic_file

_LOW_RECALL = 0.9


def mine(settings: MiningSettings, candidates: Candidates, ranks: Ranks, say: Say = print) -> dict[str, Any] | None:
    """Mine the negatives of all pairs; the caller prepares the work folder, and removes it.

    Args:
        settings: the same on every rank.
        candidates: pairs and documents, the same on every rank.
        ranks: this process's rank and the world size.
        say: prints progress, on the first rank.

    Returns:
        On the first rank, the content of `OUT.summary.json`; None on the others.
    """
    began = time.perf_counter()
    tell: Say = say if ranks.is_first else silent
    with _threads(settings.threads):
        index: dict[str, Any] = {}
        if settings.miner == "bm25":
            tell(f"BM25 index of {len(candidates.texts):,} documents")
            search = bm25_search(candidates, settings.bm25_tokens)
        else:
            search, index = _model_search(settings, candidates, ranks, tell)
        units = _units(len(candidates.pairs), settings.pair_unit(len(candidates.pairs)))
        mine_here = range(len(units))[share(len(units), ranks.rank, ranks.world_size)]
        todo = [number for number in mine_here if not _part(settings, number).exists()]
        progress = Progress(tell, "searched", "pairs", sum(len(units[number]) for number in todo))
        for number in todo:
            _write_part(settings, candidates, number, units[number], search)
            progress.add(len(units[number]))
    meet(ranks)
    return _join(settings, candidates, len(units), index, began, ranks, tell) if ranks.is_first else None


def _units(count: int, unit: int) -> list[range]:
    return [range(start, min(count, start + unit)) for start in range(0, count, unit)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _model_search(
    settings: MiningSettings, candidates: Candidates, ranks: Ranks, tell: Say
) -> tuple[Search, dict[str, Any]]:
    """Encode what is not encoded yet, on all ranks. Returns the search, and a report on its index."""
    texts, asked = candidates.texts, [pair.query for pair in candidates.pairs]
    documents = VectorFiles(settings.work, "documents", len(texts), settings.document_unit(len(texts)))
    queries = VectorFiles(settings.work, "queries", len(asked), settings.pair_unit(len(asked)))
    _encode(settings, ranks, tell, (documents, texts), (queries, asked))
    meet(ranks)
    if settings.index == "exact":
        return model_search(candidates, documents, queries, None, ranks.device), {}
    path, report_path = settings.work / "index.faiss", settings.work / "index.json"
    if ranks.is_first and not report_path.exists():
        searchable = candidates.num_searchable
        tell(f"IVF index of {searchable:,} documents")
        report = build_ivf(
            path, documents, searchable, queries, min(settings.last, searchable), ranks.device, settings.threads
        )
        write_jsonl(report_path, [report])
    meet(ranks)
    report = json.loads(report_path.read_text(encoding="utf-8"))
    tell(
        f"IVF index: {report['nlist']} lists, {report['nprobe']} searched per query; finds {report['recall']:.1%} of "
        f"the exact search's first {report['recall_at']} ({report['recall_queries']} queries)"
    )
    if report["recall"] < _LOW_RECALL:
        tell(f"note: that is below {_LOW_RECALL:.0%}; --index exact misses none")
    return model_search(
        candidates, documents, queries, Ivf(path, report["nprobe"], settings.threads), ranks.device
    ), report


def _encode(settings: MiningSettings, ranks: Ranks, tell: Say, *work: tuple[VectorFiles, Sequence[str]]) -> None:
    """Write this rank's units of each set of vectors: documents first, then queries."""
    todo = []
    for vectors, texts in work:
        # queries from the last rank down, so that the remainders of documents and queries go to different ranks
        rank = ranks.rank if vectors.name == "documents" else ranks.world_size - 1 - ranks.rank
        numbers = range(vectors.num_units)[share(vectors.num_units, rank, ranks.world_size)]
        todo += [(vectors, texts, number) for number in numbers if not vectors.path(number).exists()]
    if not todo:
        return
    # imported here: it loads transformers and DeepSpeed, which BM25 does not need
    from lbr_dist.encode.encoder import open_encoder

    encoder = open_encoder(Path(str(settings.model)), None, settings.chunk_tokens)
    progress = Progress(tell, "encoded", "texts", sum(len(v.rows_of(number)) for v, _, number in todo))
    for vectors, texts, number in todo:
        rows = vectors.rows_of(number)
        kind: Literal["query", "document"] = "query" if vectors.name == "queries" else "document"
        vectors.write(number, encoder.encode(texts[rows.start : rows.stop], kind, partial(progress.within, len(rows))))
        progress.add(len(rows))


# ---- parts --------------------------------------------------------------------------------------------------------


def _part(settings: MiningSettings, number: int) -> Path:
    return settings.work / f"part-{number:05d}.jsonl"


def _write_part(settings: MiningSettings, candidates: Candidates, number: int, pairs: range, search: Search) -> None:
    """Write the lines of a unit's pairs; before them, a file with their counts."""
    rules = settings.rules
    counts: Counter[str] = Counter()
    lines = []
    for pair, (ranked, positive) in zip(pairs, search(pairs, partial(candidates.depth, last=rules.last)), strict=True):
        chosen, dropped = candidates.choose(pair, positive, ranked, rules)
        counts.update(dropped)
        counts.update(
            {"negatives": len(chosen), "ranks": sum(c.rank for c in chosen), "short": len(chosen) < rules.negatives}
        )
        known = candidates.pairs[pair]
        lines.append(
            {
                "id": known.id,
                "query": known.query,
                "source": known.source,
                "positive_ids": known.positives,
                "positive_score": round(positive, 6),
                "negative_ids": [candidates.ids[c.row] for c in chosen],
                "negative_scores": [round(c.score, 6) for c in chosen],
                "miner": "bm25" if settings.miner == "bm25" else settings.model,
            }
        )
    path = _part(settings, number)
    write_jsonl(path.with_suffix(".json"), [counts])
    write_jsonl(path, lines)


def _join(
    settings: MiningSettings,
    candidates: Candidates,
    parts: int,
    index: Mapping[str, Any],
    began: float,
    ranks: Ranks,
    tell: Say,
) -> dict[str, Any]:
    """Write the result from its parts, atomically, and a summary next to it."""
    counts: Counter[str] = Counter()
    for number in range(parts):
        counts.update(json.loads(_part(settings, number).with_suffix(".json").read_text(encoding="utf-8")))
    pairs, negatives = len(candidates.pairs), counts["negatives"]
    if not negatives:
        raise DataError(
            f"{settings.pairs}: found no negative for any of the {pairs:,} pairs ({_dropped(counts)}), expected some. "
            f"Widen the margin or the window, and delete {settings.work}, which belongs to these settings."
        )
    companion = settings.beside("documents.jsonl")
    if candidates.brought:
        write_jsonl(companion, _all_documents(settings, candidates))
    summary = {
        "pairs": pairs,
        "documents": candidates.num_documents,
        "negatives": negatives,
        "negatives_per_pair": round(negatives / pairs, 3),
        "mean_rank": round(counts["ranks"] / negatives, 2),
        "pairs_with_fewer": counts["short"],
        "dropped": {reason: counts[reason] for reason in REASONS},
        "listed_positives_dropped": candidates.listed_positives,
        "index": dict(index),
        "documents_file": str(companion) if candidates.brought else settings.documents,
        "world_size": ranks.world_size,
        "seconds": round(time.perf_counter() - began, 1),
        "settings": asdict(settings),
    }
    with atomic_file(settings.beside("summary.json")) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    with atomic_file(Path(settings.out)) as file:
        for number in range(parts):
            with _part(settings, number).open("rb") as part:
                shutil.copyfileobj(part, file)
    tell(
        f"{pairs:,} pairs, {summary['negatives_per_pair']:.2f} negatives per pair at mean rank "
        f"{summary['mean_rank']:.1f}, {counts['short']:,} pairs with fewer than {settings.negatives}, "
        f"{summary['seconds']:.0f} s\ndropped: {_dropped(counts)}"
    )
    if candidates.listed_positives:
        tell(f"{candidates.listed_positives:,} negatives of {settings.pairs} were positives of their pair: left out")
    if candidates.brought:
        tell(
            f"{len(candidates.brought):,} positives are not in the corpus: {companion} has them and all documents of "
            f"{settings.documents}; set data.corpus to it when you train on {settings.out}"
        )
    tell(f"written to {settings.out}")
    return summary


def _dropped(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {counts.get(reason, 0):,}" for reason in REASONS)


def _all_documents(settings: MiningSettings, candidates: Candidates) -> Iterable[dict[str, str]]:
    for name, text in (read_corpus(settings.documents, settings.columns) | candidates.brought).items():
        yield {"id": name, "text": text}
