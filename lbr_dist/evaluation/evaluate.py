"""Held-out retrieval: exact search over the test collection, for BM25, the base model, stage 1 alone and the result.

Writes `report/metrics.json`, a TREC run file for each system, and the qrels.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config import STAGES, EvaluateConfig, RunConfig
from lbr_dist.console import Say
from lbr_dist.data.record_files import Columns
from lbr_dist.data.records import Pair, read_corpus, read_pairs
from lbr_dist.data.tokenizer import SETTINGS_FILE, EmbeddingSettings
from lbr_dist.evaluation.retrieval import (
    Run,
    bm25_search,
    exact_search,
    paired_bootstrap,
    per_query_values,
    score_run,
    to_run,
    trec_names,
    write_qrels,
    write_trec_run,
)
from lbr_dist.evaluation.systems import LABELS
from lbr_dist.export.checksums import SUMMARY, identity
from lbr_dist.storage.files import write_atomic

DEPTH = 100


@dataclass(frozen=True, slots=True)
class TestSet:
    """Held-out queries, and the collection that is searched."""

    __test__ = False

    queries: list[Pair]
    documents: dict[str, str]

    @staticmethod
    def read(pairs: str | Path, documents: str | Path, columns: Columns | None = None) -> TestSet:
        """The pairs, and the collection with the positives whose texts the pairs bring along.

        A text that the collection has under another id is that document. Raises DataError if a file is malformed, or
        the collection lacks a document that a pair names by its id.
        """
        collection = read_corpus(documents, columns)
        found = read_pairs(pairs, collection, columns)
        brought = {p: found.documents[p] for pair in found.pairs for p in pair.positives if p not in collection}
        if not brought:
            return TestSet(found.pairs, collection)
        known = {text: name for name, text in reversed(collection.items())}
        names = {name: known.get(text, name) for name, text in brought.items()}
        queries = [
            replace(pair, positives=tuple(dict.fromkeys(names.get(name, name) for name in pair.positives)))
            for pair in found.pairs
        ]
        return TestSet(queries, collection | {name: text for name, text in brought.items() if names[name] == name})

    @property
    def qrels(self) -> dict[str, set[str]]:
        return {query.id: set(query.positives) for query in self.queries}


def search_bm25(test: TestSet, tokens: Literal["words", "characters"]) -> Run:
    """BM25's ranking of the test collection; see `bm25_search`."""
    names = list(test.documents)
    scores, indices = bm25_search([query.query for query in test.queries], list(test.documents.values()), DEPTH, tokens)
    return to_run([query.id for query in test.queries], names, scores, indices)


def search_model(
    test: TestSet, folder: Path, evaluate: EvaluateConfig, settings: EmbeddingSettings | None, say: Say
) -> Run:
    """A model's ranking of the test collection.

    Args:
        test: queries and documents.
        folder: a model that lbr-dist exported, any sentence-transformers folder, or a causal LM.
        evaluate: chunk size.
        settings: pooling, prompts and lengths for a causal LM that has none of its own.
        say: prints progress.
    """
    from lbr_dist.encode.encoder import open_encoder

    encoder = open_encoder(folder, settings, evaluate.chunk_tokens)
    began = last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 10 and done < total:
            last = now
            say(f"  encoded {done:,} of {total:,} texts, left {(now - began) * (total - done) / done:.0f} s")

    documents = encoder.encode(list(test.documents.values()), "document", progress)
    queries = encoder.encode([query.query for query in test.queries], "query")
    del encoder
    gc.collect()
    scores, indices = exact_search(queries, documents, DEPTH)
    return to_run([query.id for query in test.queries], list(test.documents), scores, indices)


def score(
    runs: Mapping[str, Run], test: TestSet, bootstrap: int, seed: int, main: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measures of each system, and the paired differences of `main` to each other one (nDCG@10)."""
    systems = {name: score_run(run, test.qrels, bootstrap, seed) for name, run in runs.items()}
    values = {name: per_query_values(run, test.qrels)["ndcg@10"] for name, run in runs.items()}
    comparisons = []
    for name in runs:
        if main in runs and name != main:
            difference, low, high = paired_bootstrap(values[main], values[name], bootstrap, seed)
            comparisons.append({"a": main, "b": name, "ndcg@10_difference": difference, "interval": [low, high]})
    return systems, comparisons


def examples(runs: Mapping[str, Run], test: TestSet, count: int) -> list[dict[str, Any]]:
    """A few queries, evenly spaced in the test set (not chosen by result), with each system's top three documents."""
    if not count:
        return []
    stride = max(1, len(test.queries) // count)
    return [
        {
            "query": query.query,
            "positives": [test.documents[i] for i in query.positives],
            "systems": {
                name: [
                    {"text": test.documents[i], "relevant": i in query.positives, "score": s}
                    for i, s in run[query.id][:3]
                ]
                for name, run in runs.items()
            },
        }
        for query in test.queries[::stride][:count]
    ]


def _systems(config: RunConfig, test: TestSet, say: Say) -> dict[str, Run]:
    base = EmbeddingSettings.of(config.data, "mean")
    folders: dict[str, tuple[Path, EmbeddingSettings | None]] = {
        "base": (Path(config.model.base), base),
        "learn": (config.learn_export, None),
        "lbr": (config.model_path, None),
    }
    runs: dict[str, Run] = {}
    for name in config.evaluate.systems:
        if name == "bm25":
            runs[name] = search_bm25(test, config.evaluate.bm25_tokens)
        elif folders[name][0].exists():
            say(f"evaluate: {name}, {len(test.documents):,} documents and {len(test.queries):,} queries")
            runs[name] = search_model(test, folders[name][0], config.evaluate, folders[name][1], say)
    return runs


def _training(config: RunConfig) -> dict[str, Any]:
    """World size, time and memory of the stages, from their summaries."""
    found = [
        json.loads((config.stage_path(stage) / SUMMARY).read_text(encoding="utf-8"))
        for stage in STAGES
        if (config.stage_path(stage) / SUMMARY).exists()
    ]
    return {
        "world_size": max((s["world_size"] for s in found), default=None),
        "zero_stage": config.engine.zero_stage,
        "seconds": round(sum(s["seconds"] for s in found), 1),
        "peak_memory_bytes": max((s["peak_memory_bytes"] for s in found), default=None),
    }


def check_run(config: RunConfig, say: Say = print, texts: Sequence[str] = ()) -> None:
    """Open a run's finished model with plain sentence-transformers; see `check_opened`. Takes seconds.

    Raises:
        ExportError: sentence-transformers makes something else of the model than we do.
    """
    from lbr_dist.evaluation.opened import PLAIN_TEXTS, check_opened

    folder = config.evaluated_path
    if (folder / SETTINGS_FILE).exists():
        check_opened(folder, [*PLAIN_TEXTS, *texts], config.evaluate.chunk_tokens)
        say(f"{folder}: plain sentence-transformers gives the same tokens and vectors")


def evaluate_run(config: RunConfig, say: Say = print) -> dict[str, Any]:
    """Score a finished run's systems side by side; writes `report/` except for its page.

    Returns:
        The content of `report/metrics.json`.

    Raises:
        ExportError: see `check_run`.
    """
    data = config.data
    assert data.test is not None
    began = time.perf_counter()
    test = TestSet.read(data.test, data.test_documents or data.corpus, data.columns)
    check_run(config, say, [*(query.query for query in test.queries), *test.documents.values()])
    runs = _systems(config, test, say)
    systems, comparisons = score(runs, test, config.evaluate.bootstrap, config.seed, "lbr")
    metrics = {
        "domain": config.domain,
        "model": identity(config.evaluated_path),
        **_training(config),
        "num_queries": len(test.queries),
        "num_documents": len(test.documents),
        "systems": systems,
        "comparisons": comparisons,
    }
    metrics["seconds"] = round(metrics["seconds"] + time.perf_counter() - began, 1)
    folder = config.report_path
    folder.mkdir(parents=True, exist_ok=True)
    # the page comes last: a report that has one is complete
    (folder / "index.html").unlink(missing_ok=True)
    _write_runs(folder, runs, test, say)
    write_atomic(folder / "examples.json", json.dumps(examples(runs, test, config.evaluate.examples), indent=1) + "\n")
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def evaluate_folders(
    folders: Mapping[str, Path],
    test: TestSet,
    evaluate: EvaluateConfig,
    settings: EmbeddingSettings | None,
    seed: int,
    out: Path,
    say: Say = print,
) -> dict[str, Any]:
    """Score model folders beside BM25; writes `metrics.json` and the TREC files to `out`.

    Args:
        folders: name to folder; the first one is compared with the others.
        test: queries and documents.
        evaluate: BM25's tokens, chunk size, resamples.
        settings: for causal LMs that have none of their own.
        seed: of the bootstrap.
        out: folder for the results.
        say: prints progress.
    """
    runs = {"bm25": search_bm25(test, evaluate.bm25_tokens)}
    for name, folder in folders.items():
        say(f"evaluate: {name}, {len(test.documents):,} documents and {len(test.queries):,} queries")
        runs[name] = search_model(test, folder, evaluate, settings, say)
    systems, comparisons = score(runs, test, evaluate.bootstrap, seed, next(iter(folders)))
    metrics = {
        "models": {name: str(folder) for name, folder in folders.items()},
        "num_queries": len(test.queries),
        "num_documents": len(test.documents),
        "systems": systems,
        "comparisons": comparisons,
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_runs(out, runs, test, say)
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _write_runs(folder: Path, runs: Mapping[str, Run], test: TestSet, say: Say) -> None:
    written = trec_names([*(query.id for query in test.queries), *test.documents])
    changed = next((name for name, escaped in written.items() if name != escaped), None)
    if changed is not None:
        say(f"evaluate: ids with white space are percent-encoded in {folder}'s TREC files: {written[changed]}")
    for name, run in runs.items():
        write_trec_run(folder / f"{name}.run", run, name, written)
    write_qrels(folder / "test.qrels", test.qrels, written)


def table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The systems' measures as lines of text."""
    measures: Sequence[str] = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
    width = max(len(LABELS.get(name, name)) for name in systems)
    lines = [" " * width + "".join(f"{m:>12}" for m in measures) + "   95 % interval of nDCG@10"]
    for name, values in systems.items():
        low, high = values["ndcg@10_interval"]
        figures = "".join(f"{values[m]:>12.3f}" for m in measures)
        lines.append(f"{LABELS.get(name, name):<{width}}{figures}   [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)
