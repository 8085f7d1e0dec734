"""Each rule on which candidates become negatives, on its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lbr_dist.mining.candidates import Candidates, MiningRules
from tests.unit.mining.cases import write


@pytest.fixture
def few(tmp_path: Path) -> Candidates:
    """Rows 0 to 6: a positive, another pair's positive for the same query, four others, a positive with b's text."""
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
    chosen, dropped = few.choose(0, 0.9, RANKED, MiningRules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["a", "b", "c", "d"] and [c.rank for c in chosen] == [1, 2, 3, 4]
    assert +dropped == Counter({"positive": 1, "same text": 1, "other positive": 1, "duplicate": 1})
    chosen, dropped = few.choose(1, 0.9, RANKED, MiningRules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["a", "b", "c", "d"]
    assert +dropped == Counter({"positive": 1, "other positive": 1, "same text": 1, "duplicate": 1})
    # the positive's text comes first under another id, which must not become its negative
    chosen, dropped = few.choose(2, 0.9, RANKED, MiningRules(8, 1, 100))
    assert [few.ids[c.row] for c in chosen] == ["p", "o", "a", "c", "d"]
    assert +dropped == Counter({"positive": 1, "same text": 1, "duplicate": 1})
    assert few.positive_rows(2) == [6] and few.depth(0, 2) == 4 and few.depth(0, 100) == 6
    assert few.most_candidates() == 5


def test_margins_are_those_of_the_paper(few: Candidates) -> None:
    def kept(**margin: float) -> tuple[list[float], int]:
        chosen, dropped = few.choose(0, 0.8, RANKED, MiningRules(8, 1, 100, **margin))
        return [c.score for c in chosen], dropped["margin"]

    assert kept(margin_percent=0.75) == ([0.6, 0.5, 0.4], 1)  # at most 0.6
    assert kept(margin_percent=0.5) == ([0.4], 3)  # exactly at the limit
    assert kept(margin_absolute=0.2) == ([0.6, 0.5, 0.4], 1)
    assert kept(margin_absolute=0.2001) == ([0.5, 0.4], 2)
    assert kept(margin_absolute=0.35) == ([0.4], 3)
    assert kept() == ([0.7, 0.6, 0.5, 0.4], 0)
    assert MiningRules(8, 1, 9, margin_percent=0.5).limit(-0.4) == -0.4  # not -0.2, which is above the positive
    assert MiningRules(8, 1, 9, margin_percent=0.5).limit(0.4) == 0.2


def test_the_window_counts_only_candidates(few: Candidates) -> None:
    chosen, dropped = few.choose(0, 0.9, RANKED, MiningRules(2, 2, 3))
    assert [(few.ids[c.row], c.rank) for c in chosen] == [("b", 2), ("c", 3)]
    assert dropped["window"] == 1


def test_random_negatives_repeat_with_the_seed_and_are_in_order(few: Candidates) -> None:
    def drawn(number: int, seed: int) -> tuple[int, ...]:
        chosen, _ = few.choose(number, 0.9, RANKED, MiningRules(2, 1, 100, sample="random", seed=seed))
        assert [c.rank for c in chosen] == sorted({c.rank for c in chosen})
        return tuple(c.rank for c in chosen)

    assert [drawn(0, s) for s in range(20)] == [drawn(0, s) for s in range(20)]
    assert len({drawn(0, s) for s in range(40)}) == 6
    assert [drawn(0, s) for s in range(20)] != [drawn(1, s) for s in range(20)]
