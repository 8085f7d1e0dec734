"""The test set: held-out queries, and the collection that has what they ask for."""

from __future__ import annotations

import json
from pathlib import Path

from lbr_dist.evaluation.evaluate import TestSet, examples


def _jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_positives_that_pairs_bring_along_are_searched_too(tmp_path: Path) -> None:
    corpus = _jsonl(tmp_path / "corpus.jsonl", {"id": "d1", "text": "A"}, {"id": "d2", "text": "A"})
    pairs = _jsonl(
        tmp_path / "test.jsonl",
        {"id": "known", "question": "hot", "answer": "A", "negative": "C"},
        {"id": "new", "question": "cold", "answer": ["B", "A"]},
    )
    test = TestSet.read(pairs, corpus)
    new = test.queries[1].positives[0]
    assert test.documents == {"d1": "A", "d2": "A", new: "B"}
    assert test.qrels == {"known": {"d1"}, "new": {new, "d1"}}
    run = {"known": [("d1", 0.5)], "new": [(new, 0.5)]}
    assert [each["positives"] for each in examples({"lbr": run}, test, 2)] == [["A"], ["B", "A"]]


def test_a_collection_that_has_all_positives_stays_as_it_is(tmp_path: Path) -> None:
    corpus = _jsonl(tmp_path / "corpus.jsonl", {"id": "d1", "text": "A"}, {"id": "d2", "text": "A"})
    pairs = _jsonl(tmp_path / "test.jsonl", {"id": "q", "query": "hot", "positive_ids": ["d2"]})
    test = TestSet.read(pairs, corpus)
    assert test.documents == {"d1": "A", "d2": "A"} and test.qrels == {"q": {"d2"}}
