"""Mined negatives against a brute force written from the rules, each rule alone, restarts, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lbr_dist import console as progress_lines
from lbr_dist import preflight
from lbr_dist.data.records import read_corpus, read_pairs
from lbr_dist.encode.encoder import Encoder
from lbr_dist.errors import ConfigError, DataError
from lbr_dist.evaluation.retrieval import Bm25, exact_search
from lbr_dist.launch import cli
from lbr_dist.mining import index as mining_index
from lbr_dist.mining import mine as mining
from lbr_dist.mining.candidates import Candidates, Rules
from lbr_dist.mining.index import Ivf, Vectors, build_ivf, ivf_lists
from lbr_dist.mining.work import MiningSettings, clean, prepare
from lbr_dist.ranks.group import Ranks
from tests import tiny

ALONE = Ranks.alone()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A corpus with texts that stand in it twice, and pairs of which two share a query and one has two positives."""
    corpus = [{"id": name, "text": text} for name, text in tiny.texts().items()]
    corpus += [{"id": f"{row['id']}-again", "text": f"  {row['text'].upper()}\n"} for row in corpus[10:50:5]]
    pairs = [{k: v for k, v in row.items() if k != "negative_ids"} for row in tiny.pairs()]
    pairs.append({"id": "same query", "query": "LARGE  heart", "positive_ids": ["d9"]})
    pairs.append({"id": "two positives", "query": "curved skin", "positive_ids": ["d40", "d15-again"]})
    write(tmp_path / "corpus.jsonl", corpus)
    write(tmp_path / "train.jsonl", pairs)
    return tmp_path


def settings(folder: Path, model: Path | None, **changes: Any) -> MiningSettings:
    given: dict[str, Any] = {"miner": "model" if model else "bm25", "margin_percent": 0.95, "unit": 16}
    return MiningSettings(
        pairs=str(folder / "train.jsonl"),
        documents=str(folder / "corpus.jsonl"),
        out=str(folder / "mined.jsonl"),
        model=None if model is None else str(model),
        **given | changes,
    )


def mine(chosen: MiningSettings, told: list[str] | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    say: Callable[[str], None] = [].append if told is None else told.append  # type: ignore[assignment]
    prepare(chosen, say)
    summary = mining.mine(chosen, Candidates.read(chosen.pairs, chosen.documents), ALONE, say)
    assert summary is not None
    return [json.loads(line) for line in Path(chosen.out).read_text().splitlines()], summary


# ---- against brute force ------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(text.split()).lower()


def slow_mine(chosen: MiningSettings, scores: np.ndarray[Any, Any]) -> tuple[dict[str, list[str]], Counter[str]]:
    """Each pair's negatives from the scores of all its documents, `[pairs, documents]`, one document at a time."""
    corpus = read_corpus(chosen.documents)
    pairs = read_pairs(chosen.pairs, corpus).pairs
    names, texts = list(corpus), {name: plain(text) for name, text in corpus.items()}
    # of texts that stand twice, the first of the file is the one that is searched
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
def test_exact_mining_is_brute_force(name: str, data: Path, tiny_model: Path) -> None:
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
def test_bm25_mining_is_brute_force(margin: float | None, data: Path) -> None:
    chosen = settings(data, None, margin_percent=margin, bm25_tokens="characters")
    rows, summary = mine(chosen)
    # the collection that is scored has each text once, and then the positives that stand there under another id
    candidates = Candidates.read(chosen.pairs, chosen.documents)
    index = Bm25(candidates.texts, "characters")
    place = {name: i for i, name in enumerate(candidates.ids)}
    at = [place.get(name, -1) for name in read_corpus(chosen.documents)]
    scores = np.array([np.where(np.array(at) < 0, 0, index.scores(p.query)[at]) for p in candidates.pairs])
    expected, dropped = slow_mine(chosen, scores)
    assert {row["id"]: row["negative_ids"] for row in rows} == expected
    assert summary["dropped"]["margin"] == dropped["margin"] and (dropped["margin"] > 0) == (margin is not None)
    assert {row["miner"] for row in rows} == {"bm25"}


# ---- rules --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path) -> Candidates:
    """Rows 0 to 6: a positive, its twin, another pair's positive for the query, and four others of which one twice."""
    texts = {"p": "Big  heart", "o": "large heart", "a": "an ear", "b": "a jaw", "c": "a foot", "d": "a lung"}
    corpus = [{"id": k, "text": v} for k, v in texts.items()]
    corpus += [{"id": "p2", "text": "big heart "}, {"id": "b2", "text": "A jaw"}]
    pairs = [
        {"id": "1", "query": "heart", "positive_ids": ["p"], "negative_ids": ["a", "p"]},
        {"id": "2", "query": " Heart", "positive_ids": ["o"]},
        {"id": "3", "query": "jaw", "positive_ids": ["b2"]},
    ]
    return Candidates.read(write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "corpus.jsonl", corpus))


RANKED = [(0, 0.9), (1, 0.8), (2, 0.7), (3, 0.6), (4, 0.5), (5, 0.4)]


def test_no_false_negative_is_taken_and_each_is_counted(few: Candidates) -> None:
    assert few.ids == ["p", "o", "a", "b", "c", "d", "b2"] and few.num_searchable == 6
    assert few.listed_positives == 1 and few.num_documents == 8
    chosen, dropped = few.choose(0, 0.9, RANKED, Rules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["a", "b", "c", "d"] and [c.rank for c in chosen] == [1, 2, 3, 4]
    assert +dropped == Counter({"positive": 1, "same text": 1, "other positive": 1, "duplicate": 1})
    chosen, dropped = few.choose(1, 0.9, RANKED, Rules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["a", "b", "c", "d"]
    assert +dropped == Counter({"positive": 1, "other positive": 1, "same text": 1, "duplicate": 1})
    # the positive stands in the corpus under another id first, which must not become its negative
    chosen, dropped = few.choose(2, 0.9, RANKED, Rules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["p", "o", "a", "c", "d"]
    assert +dropped == Counter({"positive": 1, "same text": 1, "duplicate": 1})
    assert few.positive_rows(2) == [6] and few.depth(0, 2) == 4 and few.depth(0, 100) == 6
    assert few.most_candidates() == 5


def test_margins_are_those_of_the_paper(few: Candidates) -> None:
    def kept(**margin: float) -> tuple[list[float], int]:
        chosen, dropped = few.choose(0, 0.8, RANKED, Rules(8, 1, 100, **margin))
        return [c.score for c in chosen], dropped["margin"]

    assert kept(margin_percent=0.75) == ([0.6, 0.5, 0.4], 1)  # at most 0.6
    assert kept(margin_percent=0.5) == ([0.4], 3)  # exactly at the limit
    assert kept(margin_absolute=0.2) == ([0.6, 0.5, 0.4], 1)
    assert kept(margin_absolute=0.2001) == ([0.5, 0.4], 2)
    assert kept(margin_absolute=0.35) == ([0.4], 3)
    assert kept() == ([0.7, 0.6, 0.5, 0.4], 0)
    assert Rules(8, 1, 9, margin_percent=0.5).limit(-0.4) == -0.4  # not -0.2, which is above the positive
    assert Rules(8, 1, 9, margin_percent=0.5).limit(0.4) == 0.2


def test_the_window_counts_candidates_alone(few: Candidates) -> None:
    chosen, dropped = few.choose(0, 0.9, RANKED, Rules(2, 2, 3))
    assert [(few.ids[c.row], c.rank) for c in chosen] == [("b", 2), ("c", 3)]
    assert dropped["window"] == 1


def test_random_negatives_repeat_with_the_seed_and_are_in_order(few: Candidates) -> None:
    def drawn(number: int, seed: int) -> tuple[int, ...]:
        chosen, _ = few.choose(number, 0.9, RANKED, Rules(2, 1, 100, sample="random", seed=seed))
        assert [c.rank for c in chosen] == sorted({c.rank for c in chosen})
        return tuple(c.rank for c in chosen)

    assert [drawn(0, s) for s in range(20)] == [drawn(0, s) for s in range(20)]
    assert len({drawn(0, s) for s in range(40)}) == 6
    assert [drawn(0, s) for s in range(20)] != [drawn(1, s) for s in range(20)]


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


def test_positives_that_no_corpus_has_come_in_a_corpus_of_their_own(data: Path, tiny_model: Path) -> None:
    texts = tiny.texts()
    rows = [
        {"anchor": "painful foot", "positive": texts["d85"]},
        {"anchor": "big toe", "positive": "The toe is large.", "negative": texts["d3"]},
    ]
    write(data / "train.jsonl", rows)
    chosen, told = settings(data, tiny_model, margin_percent=1.0), []
    mined, summary = mine(chosen, told)
    companion = chosen.beside("documents.jsonl")
    assert mined[0]["positive_ids"] == ["d85"] and mined[1]["positive_ids"][0].startswith("text-")
    after = read_pairs(chosen.out, read_corpus(companion))
    assert after.documents[mined[1]["positive_ids"][0]] == "The toe is large."
    assert read_corpus(companion).items() > read_corpus(chosen.documents).items()
    assert summary["documents_file"] == str(companion)
    assert any(f"1 positives are in no corpus: {companion}" in line and "data.corpus" in line for line in told)
    # what a pair brings is scored, but is nobody's candidate
    assert mined[1]["positive_ids"][0] not in mined[0]["negative_ids"]


def test_an_interrupted_mining_goes_on(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, told = settings(data, tiny_model), []
    mine(chosen)
    whole = Path(chosen.out).read_bytes()
    gone = [chosen.work / name for name in ("documents-00002.npy", "queries-00001.npy", "part-00003.jsonl")]
    for path in (Path(chosen.out), *gone):
        path.unlink()
    # what a killed process leaves under a hidden name is no slice
    (chosen.work / ".documents-00002.npy.1").write_bytes(b"half")
    before = {path: path.stat().st_ino for path in (*chosen.work.glob("*.npy"), *chosen.work.glob("part-*.jsonl"))}
    mine(chosen, told)
    assert Path(chosen.out).read_bytes() == whole
    assert any("going on with an unfinished mining" in line for line in told)
    assert all(path.stat().st_ino == inode for path, inode in before.items()) and all(p.exists() for p in gone)
    Path(chosen.out).unlink()
    monkeypatch.setattr("lbr_dist.encode.encoder.open_encoder", lambda *_: pytest.fail("all vectors are there"))
    mine(chosen)
    assert Path(chosen.out).read_bytes() == whole


def test_the_result_is_there_as_a_whole_or_not_at_all(data: Path) -> None:
    chosen = settings(data, None)
    Path(chosen.out).write_text("what was there before")
    prepare(chosen, print)
    candidates = Candidates.read(chosen.pairs, chosen.documents)
    mining.mine(chosen, candidates, ALONE, print)
    Path(chosen.out).write_text("what was there before")
    part = chosen.work / "part-00004.jsonl"
    part.unlink()
    part.mkdir()  # it is there, and cannot be read
    with pytest.raises(OSError, match="part-00004"):
        mining.mine(chosen, candidates, ALONE, print)
    assert Path(chosen.out).read_text() == "what was there before"
    assert not list(data.glob(".*"))


def test_another_work_folder_is_refused(data: Path, tiny_model: Path) -> None:
    chosen = settings(data, tiny_model)
    prepare(chosen, print)
    with pytest.raises(ConfigError, match=r"mined.jsonl.work: .* differs in --last, --margin-percent, expected"):
        prepare(settings(data, tiny_model, last=50, margin_percent=None), print)
    with pytest.raises(ConfigError, match=r"differs in --model, --with, contents of files"):
        prepare(settings(data, None), print)
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"id": "more", "text": "more"}\n')
    with pytest.raises(ConfigError, match="differs in contents of files, or the version of torch"):
        prepare(chosen, print)
    (chosen.work / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="differs in all of it"):
        prepare(chosen, print)


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path, "documents", 5, 2)
    with pytest.raises(DataError, match=r"documents: found NaN .* of texts range\(2, 4\)"):
        vectors.write(1, torch.tensor([[1.0], [math.nan]]))
    assert not list(tmp_path.iterdir())


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    clock = iter([0.0, 4.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: next(clock))
    progress = progress_lines.Progress(told.append, "encoded", "texts", 4000)
    progress.within(1000, 100, 200)
    progress.add(1000)
    progress.add(500)
    progress.within(1000, 50, 100)
    assert told == [
        "encoded 1,000 of 4,000 texts of the first rank, left 60 s",
        "encoded 2,000 of 4,000 texts of the first rank, left 40 s",
    ]


# ---- IVF ----------------------------------------------------------------------------------------------------------


def _vectors(folder: Path, name: str, values: torch.Tensor) -> Vectors:
    vectors = Vectors(folder, name, len(values), 300)
    for number in range(vectors.num_units):
        rows = vectors.rows_of(number)
        vectors.write(number, values[rows.start : rows.stop])
    return vectors


def test_ivf_finds_nearly_what_the_exact_search_finds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=generator)
    values = centres[torch.randint(0, 60, (5000,), generator=generator)]
    values = torch.nn.functional.normalize(values + 0.4 * torch.randn(5000, 16, generator=generator), dim=1)
    documents, queries = _vectors(tmp_path, "documents", values[:4000]), _vectors(tmp_path, "queries", values[4000:])
    searchable, k = 3900, 50
    report = build_ivf(tmp_path / "index", documents, searchable, queries, k, torch.device("cpu"), 1)
    assert (report["nlist"], report["nprobe"]) == ivf_lists(searchable) == (100, 13)
    scores, rows = exact_search(values[4000:], values[:searchable], k)
    found = Ivf(tmp_path / "index", report["nprobe"], 1).search(values[4000:].numpy(), k)
    sample = [i * 1000 // 200 for i in range(200)]
    recall = [len({r for r, _ in found[i]} & set(rows[i].tolist())) / k for i in range(1000)]
    assert report["recall"] == pytest.approx(np.mean([recall[i] for i in sample]), abs=1e-4)
    assert 0.9 < np.mean(recall) < 1 and report["recall_at"] == k and report["recall_queries"] == 200
    # all lists searched: the exact result, in its order
    complete = Ivf(tmp_path / "index", report["nlist"], 1).search(values[4000:].numpy(), k)
    assert [[r for r, _ in row] for row in complete] == rows.tolist()
    torch.testing.assert_close(torch.tensor([[s for _, s in row] for row in complete]), scores)


def test_ivf_of_few_documents_is_one_list() -> None:
    assert ivf_lists(1) == ivf_lists(77) == (1, 1)
    assert ivf_lists(10_000) == (256, 32) and ivf_lists(1_000_000) == (4000, 500)


def test_mining_with_ivf(data: Path, tiny_model: Path) -> None:
    exact, _ = mine(settings(data, tiny_model))
    clean(settings(data, tiny_model))
    told: list[str] = []
    rows, summary = mine(settings(data, tiny_model, index="ivf"), told)
    assert [row["negative_ids"] for row in rows] == [row["negative_ids"] for row in exact]
    assert summary["index"]["recall"] == 1.0
    assert any(line.startswith("IVF index: 2 lists, 2 searched for a query; finds 100.0%") for line in told)


# ---- what is refused ----------------------------------------------------------------------------------------------

MODEL = ("--model", "MODEL")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), r"--model: found none, expected a model folder, or --with bm25"),
    "model asked for": (("--with", "model"), r"--model: found None, expected a model folder"),
    "no such model": (("--model", "nowhere"), r"--model: found 'nowhere', which is not a folder"),
    "no model folder": (("--model", "."), r"--model: \. has no config.json"),
    "no pairs": ((*MODEL, "--pairs", "nowhere.jsonl"), r"nowhere.jsonl: no such file or folder"),
    "no documents": ((*MODEL, "--documents", "nowhere.jsonl"), r"nowhere.jsonl: no such file or folder"),
    "first after last": (
        (*MODEL, "--first", "9", "--last", "8"),
        r"--first: found 9, expected at most --last, which is 8",
    ),
    "narrow window": ((*MODEL, "--last", "7"), r"--negatives: found 8, expected at most the 7 of --first to --last"),
    "first": ((*MODEL, "--first", "0"), r"--first: found 0, expected one or more"),
    "negatives": ((*MODEL, "--negatives", "0"), r"--negatives: found 0, expected one or more"),
    "both margins": (
        (*MODEL, "--margin-percent", "0.9", "--margin-absolute", "0.1"),
        r"--margin-absolute: found 0.1, expected no --margin-percent beside it",
    ),
    "percent": ((*MODEL, "--margin-percent", "1.5"), r"--margin-percent: found 1.5, expected above 0 and at most 1"),
    "no percent": ((*MODEL, "--margin-percent", "0"), r"--margin-percent: found 0.0, expected above 0"),
    "absolute": ((*MODEL, "--margin-absolute", "-1"), r"--margin-absolute: found -1.0, expected 0 or more"),
    "ivf of bm25": (("--with", "bm25", "--index", "ivf"), r"--index: found ivf, expected exact with --with bm25"),
    "out is no .jsonl": ((*MODEL, "--out", "mined.csv"), r"--out: found 'mined.csv', expected .* ends in .jsonl"),
    "out is the pairs": ((*MODEL, "--out", "./train.jsonl"), r"--out: found 'train.jsonl', which is --pairs"),
    "out below a file": ((*MODEL, "--out", "train.jsonl/x.jsonl"), r"--out: found .* is not a writable folder"),
    "out of this world": ((*MODEL, "--out", "/proc/x/y.jsonl"), r"/proc/x"),
    "ranks": ((*MODEL, "--ranks", "1000"), r"--ranks: found 1000, this machine has \d+ cores"),
    "no ranks": ((*MODEL, "--ranks", "0"), r"--ranks: found 0, expected one or more"),
    "no candidates": ((*MODEL, "--first", "96"), r"corpus.jsonl: found 95 candidates .* expected at least 96"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str, data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    monkeypatch.chdir(data)
    monkeypatch.setattr("lbr_dist.launch.local_ranks.run_stage", lambda *_: pytest.fail("a rank was started"))
    given, expected = MISTAKES[name]
    arguments = ["data", "negatives", "--pairs", "train.jsonl", "--documents", "corpus.jsonl", "--out", "mined.jsonl"]
    if name == "no candidates":
        given = (*given, "--last", "200")
    assert cli.main([*arguments, *(str(tiny_model) if each == "MODEL" else each for each in given)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and re.search(expected, captured.err)
    assert not Path("mined.jsonl").exists() and not Path("mined.jsonl.work").exists()


def test_no_negative_at_all(data: Path) -> None:
    with pytest.raises(DataError, match=r"found no negative for any of the 98 pairs \(positive \d+.*margin [1-9]"):
        mine(settings(data, None, margin_percent=1e-9))
    assert not (data / "mined.jsonl").exists()


def test_a_machine_without_faiss_or_memory(
    data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = settings(data, tiny_model, index="ivf")
    with monkeypatch.context() as patch:
        patch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ConfigError, match=r"faiss is not installed. Install it with `pip install 'lbr-dist\[mining\]'"
        ):
            preflight.check_mining(chosen)
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ConfigError, match=r"faiss cannot be imported .*lbr-dist\[mining\]"):
            mining_index.Ivf(tmp_path / "index", 1, 1)
    monkeypatch.setattr(preflight.hardware, "memory", lambda: (2**31, 2**34))
    assert preflight.check_mining_ranks(chosen, None, gpus=0) <= 2
    assert preflight.check_mining_ranks(chosen, None, gpus=3) == 3
    with pytest.raises(preflight.LaunchError, match="found 3, this machine has room for 2 ranks"):
        preflight.check_mining_ranks(chosen, 3, gpus=0)


def test_a_mistake_needs_no_torch(data: Path) -> None:
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "assert cli.main(sys.argv[1:]) == 1\n"
        "heavy = {'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    given = [
        "data",
        "negatives",
        "--pairs",
        "x.jsonl",
        "--documents",
        "corpus.jsonl",
        "--out",
        "o.jsonl",
        "--with",
        "bm25",
    ]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False, cwd=data)
    assert done.returncode == 0 and "error: x.jsonl: no such file" in done.stderr
