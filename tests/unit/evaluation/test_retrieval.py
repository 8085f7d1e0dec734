"""Search and measures against slow references written from their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.errors import DataError
from lbr_dist.evaluation.retrieval import (
    MEASURES,
    Run,
    _sort_keys,
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


def slow_search(queries: torch.Tensor, documents: torch.Tensor, k: int) -> list[list[int]]:
    scores = (queries.double() @ documents.double().T).tolist()
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in scores]


@given(
    q=st.integers(1, 5), n=st.integers(1, 40), k=st.integers(1, 50), block=st.integers(1, 50), seed=st.integers(0, 999)
)
@settings(max_examples=80, deadline=None)
def test_exact_search_is_the_sorted_search_with_ties_by_index(q: int, n: int, k: int, block: int, seed: int) -> None:
    # small integers: sums are exact, and there are many ties and negative scores
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (q, 3), generator=generator).float()
    documents = torch.randint(-2, 3, (n, 3), generator=generator).float()
    scores, indices = exact_search(queries, documents, k, block=block)
    assert indices.tolist() == slow_search(queries, documents, k)
    assert torch.equal(scores, (queries @ documents.T).gather(1, indices))
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64


def test_minus_zero_ties_with_zero() -> None:
    keys = _sort_keys(torch.tensor([[-0.0, 0.0, -0.0, -1.0]]), first_index=5)
    assert keys.argsort(descending=True).tolist() == [[0, 1, 2, 3]]


def test_exact_search_crosses_query_blocks_and_keeps_float_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(600, 8, generator=generator), torch.randn(90, 8, generator=generator)
    scores, indices = exact_search(queries, documents, 7, block=32)
    expected = (queries @ documents.T).topk(7)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_exact_search_without_queries_or_documents_has_the_right_shapes() -> None:
    assert exact_search(torch.zeros(0, 4), torch.ones(5, 4), 3)[1].shape == (0, 3)
    assert exact_search(torch.ones(2, 4), torch.zeros(0, 4), 3)[1].shape == (2, 0)


def test_exact_search_refuses_nan_infinity_and_mismatched_shapes() -> None:
    with pytest.raises(DataError, match="diverged"):
        exact_search(torch.tensor([[float("nan")]]), torch.ones(2, 1), 1)
    with pytest.raises(DataError, match="document vectors"):
        exact_search(torch.ones(1, 1), torch.tensor([[1.0], [float("inf")]]), 1)
    with pytest.raises(DataError, match="same d"):
        exact_search(torch.ones(1, 2), torch.ones(2, 3), 1)


def slow_bm25(query: list[str], documents: list[list[str]]) -> list[float]:
    """Lucene's BM25 from its formula, k1 = 1.5 and b = 0.75."""
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            tf = document.count(word)
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
        scores.append(score)
    return scores


def test_bm25_words_follows_the_formula() -> None:
    documents = ["Red apple, red pear", "green APPLE", "blue sky over blue sea", "a pear"]
    split = [d.lower().replace(",", "").split() for d in documents]
    scores, indices = bm25_search(["Apple red", "over PEAR"], documents, k=4)
    for row, query in enumerate((["apple", "red"], ["over", "pear"])):
        expected = slow_bm25(query, split)
        found = {i: s for s, i in zip(scores[row].tolist(), indices[row].tolist(), strict=True) if s > -math.inf}
        assert found == pytest.approx({i: s for i, s in enumerate(expected) if s > 0}, rel=1e-5)
        assert list(found) == sorted(found, key=lambda i: -expected[i])
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64 and indices.shape == (2, 4)


def test_bm25_breaks_ties_by_index_and_leaves_out_documents_that_share_no_token() -> None:
    scores, indices = bm25_search(["x", "zebra", ""], ["y", "x", "q", "x", "x"], k=2)
    assert indices[0].tolist() == [1, 3] and scores[0, 0] == scores[0, 1]
    assert torch.isinf(scores[1:]).all()
    assert to_run(["a", "b", "c"], list("01234"), scores, indices) == {
        "a": [("1", scores[0, 0].item()), ("3", scores[0, 1].item())],
        "b": [],
        "c": [],
    }


def test_bm25_keeps_the_order_among_many_ties() -> None:
    documents = ["x y" if i % 3 else "x" for i in range(600)]
    indices = bm25_search(["x"], documents, k=300)[1][0].tolist()
    assert indices == [*range(0, 600, 3), *[i for i in range(600) if i % 3][:100]]


def test_bm25_of_characters_finds_inside_words_and_survives_short_and_empty_texts() -> None:
    documents = ["CC(=O)Oc1ccccc1", "NCCO", "", "n"]
    _, indices = bm25_search(["c(=o)o"], documents, k=1, tokens="characters")
    assert indices.tolist() == [[0]]
    scores, indices = bm25_search(["N"], documents, k=9, tokens="characters")
    assert indices[0, 0] == 3 and torch.isfinite(scores).sum() == 1 and scores.shape == (1, 4)
    assert torch.isinf(bm25_search(["a"], ["", "!"], k=2)[0]).all()


def slow_values(ranked: list[str], relevant: set[str]) -> dict[str, float]:
    gains = [1.0 if document in relevant else 0.0 for document in ranked]
    ideal = sorted([1.0] * len(relevant) + [0.0] * 10, reverse=True)
    dcg = [sum(g / math.log(i + 2, 2) for i, g in enumerate(row[:10])) for row in (gains, ideal)]
    first = next((i for i, g in enumerate(gains[:10]) if g), None)
    return {
        "ndcg@10": dcg[0] / dcg[1],
        "recall@10": sum(gains[:10]) / len(relevant),
        "recall@100": sum(gains[:100]) / len(relevant),
        "mrr@10": 0.0 if first is None else 1 / (first + 1),
    }


@given(
    rankings=st.lists(
        st.tuples(
            st.lists(st.integers(0, 130), unique=True, max_size=130),
            st.sets(st.integers(0, 130), min_size=1, max_size=30),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_measures_are_their_definitions(rankings: list[tuple[list[int], set[int]]]) -> None:
    run: Run = {str(i): [(str(d), -float(r)) for r, d in enumerate(docs)] for i, (docs, _) in enumerate(rankings)}
    qrels = {str(i): {str(d) for d in relevant} for i, (_, relevant) in enumerate(rankings)}
    slow = [slow_values([d for d, _ in run[q]], qrels[q]) for q in qrels]
    values, means = per_query_values(run, qrels), score_run(run, qrels, bootstrap=5, seed=1)
    for name in MEASURES:
        assert values[name] == pytest.approx([row[name] for row in slow])
        assert means[name] == pytest.approx(sum(row[name] for row in slow) / len(slow))
        assert 0 <= values[name][0] <= 1 + 1e-12


def test_a_known_ndcg() -> None:
    # relevant at ranks 1 and 3 of three relevant: (1 + 1/2) / (1 + 1/log2(3) + 1/2)
    run: Run = {"q": [("a", 3.0), ("x", 2.0), ("b", 1.0)]}
    assert per_query_values(run, {"q": {"a", "b", "c"}})["ndcg@10"] == pytest.approx([0.7039180890341347])


def test_recall_ends_at_rank_100() -> None:
    run: Run = {"q": [(str(rank), -float(rank)) for rank in range(1, 131)]}
    values = per_query_values(run, {"q": {"10", "11", "100", "101"}})
    assert (values["recall@10"], values["recall@100"]) == ([0.25], [0.75])


def test_missing_queries_count_as_zero_and_unjudged_ones_do_not_count() -> None:
    run: Run = {"a": [("d", 1.0)], "unjudged": [("d", 1.0)], "no relevant": [("d", 1.0)]}
    scores = score_run(run, {"a": {"d"}, "b": {"d"}, "no relevant": set()}, bootstrap=10, seed=0)
    assert scores["mrr@10"] == 0.5
    with pytest.raises(DataError, match="test split"):
        score_run(run, {"a": set()}, bootstrap=10, seed=0)
    with pytest.raises(DataError, match="twice"):
        score_run({"a": [("d", 2.0), ("d", 1.0)]}, {"a": {"d"}}, bootstrap=10, seed=0)


def test_intervals_are_the_binomial_ones_and_repeat_with_the_seed() -> None:
    qrels = {str(i): {"d"} for i in range(400)}
    run: Run = {str(i): [("d" if i % 4 else "x", 1.0)] for i in range(400)}
    scores = score_run(run, qrels, bootstrap=2000, seed=3)
    low, high = scores["recall@10_interval"]  # type: ignore[misc]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    assert scores == score_run(run, qrels, bootstrap=2000, seed=3)
    assert scores != score_run(run, qrels, bootstrap=2000, seed=4)


def test_the_paired_bootstrap_uses_the_pairing() -> None:
    # a is always 0.1 above b: the difference is certain, no matter how much the queries vary
    b = [(i * 37 % 100) / 100 for i in range(100)]
    assert paired_bootstrap([v + 0.1 for v in b], b, 200, 0) == pytest.approx((0.1, 0.1, 0.1))
    difference, low, high = paired_bootstrap(b, b[::-1], 500, 0)
    assert difference == pytest.approx(0) and low < -0.02 and high > 0.02
    with pytest.raises(ValueError, match="the same number of each"):
        paired_bootstrap([1.0], [], 10, 0)


def test_trec_files(tmp_path: Path) -> None:
    write_trec_run(tmp_path / "new" / "run.txt", {"q1": [("d2", 0.1234567891), ("d1", -1.0)]}, "lbr")
    assert (tmp_path / "new" / "run.txt").read_text() == "q1 Q0 d2 1 0.123456789 lbr\nq1 Q0 d1 2 -1 lbr\n"
    write_qrels(tmp_path / "qrels.txt", {"q1": {"d2", "d1"}, "q2": set()})
    assert (tmp_path / "qrels.txt").read_text() == "q1 0 d1 1\nq1 0 d2 1\n"
    with pytest.raises(DataError, match="white space"):
        write_qrels(tmp_path / "qrels.txt", {"q 1": {"d"}})


@pytest.mark.parametrize("name", ["my q1", " q", "a\tb", "a\u00a0b", "a\u2028b", "\x1f", " "])
def test_ids_with_white_space_are_percent_encoded_in_trec_files(tmp_path: Path, name: str) -> None:
    names = trec_names(["100%", "my%20q1", name])
    run, qrels = {name: [("100%", 0.5), (name, 0.25)]}, {name: {"100%"}}
    write_trec_run(tmp_path / "run.txt", run, "lbr", names)
    write_qrels(tmp_path / "qrels.txt", qrels, names)
    lines = [line.split() for line in (tmp_path / "run.txt").read_text().splitlines()]
    assert [(unquote(line[0]), unquote(line[2])) for line in lines] == [(name, "100%"), (name, name)]
    assert [len(line) for line in lines] == [6, 6] and len(set(names.values())) == 3
    (line,) = [line.split() for line in (tmp_path / "qrels.txt").read_text().splitlines()]
    assert [unquote(word) for word in line] == [name, "0", "100%", "1"]


def test_ids_without_white_space_are_written_as_they_are() -> None:
    names = ["100%", "a%20b", "é/x:1"]
    assert trec_names(names) == dict(zip(names, names, strict=True))
