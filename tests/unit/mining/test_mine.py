"""Mined negatives compared with a brute-force search written from the rules; the files, and restarts."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_dist.data.records import read_corpus, read_pairs
from lbr_dist.encode.encoder import Encoder
from lbr_dist.errors import DataError
from lbr_dist.evaluation.retrieval import Bm25
from lbr_dist.mining import mine as mining
from lbr_dist.mining.candidates import Candidates
from lbr_dist.mining.work import MiningSettings, clean, prepare
from tests import tiny
from tests.unit.mining.cases import ALONE, mine, settings, write

# ---- against brute force ------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(text.split()).lower()


def slow_mine(chosen: MiningSettings, scores: np.ndarray[Any, Any]) -> tuple[dict[str, list[str]], Counter[str]]:
    """Each pair's negatives from the scores of all its documents, `[pairs, documents]`, one document at a time."""
    corpus = read_corpus(chosen.documents)
    pairs = read_pairs(chosen.pairs, corpus).pairs
    names, texts = list(corpus), {name: plain(text) for name, text in corpus.items()}
    # if a text is there twice, only the first one is searched
    first = {text: name for name, text in reversed(texts.items())}
    mined, dropped = {}, Counter[str]()
    for pair, row in zip(pairs, scores, strict=True):
        score = dict(zip(names, row.tolist(), strict=True))
        answers = {texts[p] for o in pairs if plain(o.query) == plain(pair.query) for p in o.positives}
        positive = min(score[p] for p in pair.positives)
        limit = positive * chosen.margin_percent if chosen.margin_percent else math.inf
        if chosen.margin_absolute is not None:
            limit = positive - chosen.margin_absolute
        rank, kept = 0, []
        for name in sorted(names, key=lambda n: -score[n]):
            if first[texts[name]] != name or texts[name] in answers:
                continue
            if chosen.miner == "bm25" and score[name] <= 0:
                continue
            rank += 1
            if rank > chosen.last:
                break
            if rank < chosen.first:
                dropped["window"] += 1
            elif score[name] > limit:
                dropped["margin"] += 1
            else:
                kept.append(name)
        mined[pair.id] = kept[: chosen.negatives]
    return mined, dropped


RULES: dict[str, dict[str, Any]] = {
    "percent": {},
    "absolute": {"margin_percent": None, "margin_absolute": 0.02},
    "window": {"margin_percent": None, "first": 4, "last": 9, "negatives": 3},
    "everything": {"margin_percent": None, "last": 500, "negatives": 500},
}


@pytest.mark.parametrize("name", RULES)
def test_exact_mining_equals_brute_force(name: str, data: Path, tiny_model: Path) -> None:
    chosen = settings(data, tiny_model, **RULES[name])
    rows, summary = mine(chosen)
    corpus, encoder = read_corpus(chosen.documents), Encoder(tiny_model)
    known = read_pairs(chosen.pairs, corpus).pairs
    vectors = encoder.encode(list(corpus.values()), "document").double()
    scores = (encoder.encode([p.query for p in known], "query").double() @ vectors.T).numpy()
    expected, dropped = slow_mine(chosen, scores)
    assert {row["id"]: row["negative_ids"] for row in rows} == expected
    assert {k: summary["dropped"][k] for k in ("margin", "window")} == {k: dropped[k] for k in ("margin", "window")}
    assert summary["negatives"] == sum(map(len, expected.values())) > 0
    assert summary["pairs_with_fewer"] == sum(len(n) < chosen.negatives for n in expected.values())
    place = {document: i for i, document in enumerate(corpus)}
    for row, pair, line in zip(rows, known, scores, strict=True):
        assert row["positive_score"] == pytest.approx(min(line[place[p]] for p in pair.positives), abs=2e-6)
        assert row["negative_scores"] == pytest.approx([line[place[n]] for n in row["negative_ids"]], abs=2e-6)


@pytest.mark.parametrize("margin", [None, 0.6])
def test_bm25_mining_equals_brute_force(margin: float | None, data: Path) -> None:
    chosen = settings(data, None, margin_percent=margin, bm25_tokens="characters")
    rows, summary = mine(chosen)
    # BM25 scores each text of the corpus once, and then the positives that are there under another id
    candidates = Candidates.read(chosen.pairs, chosen.documents)
    index = Bm25(candidates.texts, "characters")
    place = {name: i for i, name in enumerate(candidates.ids)}
    at = [place.get(name, -1) for name in read_corpus(chosen.documents)]
    scores = np.array([np.where(np.array(at) < 0, 0, index.scores(p.query)[at]) for p in candidates.pairs])
    expected, dropped = slow_mine(chosen, scores)
    assert {row["id"]: row["negative_ids"] for row in rows} == expected
    assert summary["dropped"]["margin"] == dropped["margin"] and (dropped["margin"] > 0) == (margin is not None)
    assert {row["miner"] for row in rows} == {"bm25"}


def test_mining_with_ivf(data: Path, tiny_model: Path) -> None:
    exact, _ = mine(settings(data, tiny_model))
    clean(settings(data, tiny_model))
    printed: list[str] = []
    rows, summary = mine(settings(data, tiny_model, index="ivf"), printed)
    assert [row["negative_ids"] for row in rows] == [row["negative_ids"] for row in exact]
    assert summary["index"]["recall"] == 1.0
    assert any(line.startswith("IVF index: 2 lists, 2 searched per query; finds 100.0%") for line in printed)


# ---- files --------------------------------------------------------------------------------------------------------


def test_the_result_is_read_as_pairs(data: Path, tiny_model: Path) -> None:
    chosen = settings(data, tiny_model)
    rows, summary = mine(chosen)
    corpus = read_corpus(chosen.documents)
    before, after = read_pairs(chosen.pairs, corpus), read_pairs(chosen.out, corpus)
    assert after.dropped_negatives == 0
    for old, new, row in zip(before.pairs, after.pairs, rows, strict=True):
        assert (old.id, old.query, old.positives, old.source) == (new.id, new.query, new.positives, new.source)
        assert new.negatives == tuple(row["negative_ids"])
    assert {"positive_score", "negative_scores", "miner"} < set(rows[0])
    assert json.loads(chosen.beside("summary.json").read_text()) == summary
    assert not chosen.beside("documents.jsonl").exists() and summary["documents_file"] == chosen.documents
    assert {path.name for path in data.iterdir()} == {
        *("corpus.jsonl", "train.jsonl", "mined.jsonl", "mined.jsonl.summary.json", "mined.jsonl.work")
    }
    clean(chosen)
    assert not chosen.work.exists()


def test_positives_that_the_corpus_lacks_are_written_to_a_new_corpus(data: Path, tiny_model: Path) -> None:
    texts = tiny.texts()
    rows = [
        {"anchor": "painful foot", "positive": texts["d85"]},
        {"anchor": "big toe", "positive": "The toe is large.", "negative": texts["d3"]},
    ]
    write(data / "train.jsonl", rows)
    chosen, printed = settings(data, tiny_model, margin_percent=1.0), []
    mined, summary = mine(chosen, printed)
    companion = chosen.beside("documents.jsonl")
    assert mined[0]["positive_ids"] == ["d85"] and mined[1]["positive_ids"][0].startswith("text-")
    after = read_pairs(chosen.out, read_corpus(companion))
    assert after.documents[mined[1]["positive_ids"][0]] == "The toe is large."
    assert read_corpus(companion).items() > read_corpus(chosen.documents).items()
    assert summary["documents_file"] == str(companion)
    assert any(f"1 positives are not in the corpus: {companion}" in line and "data.corpus" in line for line in printed)
    # a text that a pair brings is scored, but is never a candidate
    assert mined[1]["positive_ids"][0] not in mined[0]["negative_ids"]


def test_an_interrupted_mining_resumes(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, printed = settings(data, tiny_model), []
    mine(chosen)
    whole = Path(chosen.out).read_bytes()
    deleted = [chosen.work / name for name in ("documents-00002.npy", "queries-00001.npy", "part-00003.jsonl")]
    for path in (Path(chosen.out), *deleted):
        path.unlink()
    # a hidden file of a killed process does not count
    (chosen.work / ".documents-00002.npy.1").write_bytes(b"half")
    before = {path: path.stat().st_ino for path in (*chosen.work.glob("*.npy"), *chosen.work.glob("part-*.jsonl"))}
    mine(chosen, printed)
    assert Path(chosen.out).read_bytes() == whole
    assert any("resuming an unfinished mining" in line for line in printed)
    assert all(path.stat().st_ino == inode for path, inode in before.items()) and all(p.exists() for p in deleted)
    Path(chosen.out).unlink()
    monkeypatch.setattr("lbr_dist.encode.encoder.open_encoder", lambda *_: pytest.fail("all vectors exist"))
    mine(chosen)
    assert Path(chosen.out).read_bytes() == whole


def test_the_result_is_written_whole_or_not_at_all(data: Path) -> None:
    chosen = settings(data, None)
    Path(chosen.out).write_text("what was there before")
    prepare(chosen, print)
    candidates = Candidates.read(chosen.pairs, chosen.documents)
    mining.mine(chosen, candidates, ALONE, print)
    Path(chosen.out).write_text("what was there before")
    part = chosen.work / "part-00004.jsonl"
    part.unlink()
    part.mkdir()  # it exists, but cannot be read
    with pytest.raises(OSError, match="part-00004"):
        mining.mine(chosen, candidates, ALONE, print)
    assert Path(chosen.out).read_text() == "what was there before"
    assert not list(data.glob(".*"))


def test_no_negative_for_any_pair_is_an_error(data: Path) -> None:
    with pytest.raises(DataError, match=r"found no negative for any of the 98 pairs \(positive \d+.*margin [1-9]"):
        mine(settings(data, None, margin_percent=1e-9))
    assert not (data / "mined.jsonl").exists()
