"""Which documents may be a pair's negatives: the rules against false negatives. Computes no scores.

Documents are numbered by row. The first `num_searchable` rows are the corpus, each text once, ignoring white space and
case. The rows after them are positives whose text is already there, or not in the corpus; only their scores are used.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lbr_dist.console import Say, silent
from lbr_dist.data.record_files import Columns
from lbr_dist.data.records import Pair, read_corpus, read_pairs

REASONS = ("positive", "same text", "other positive", "duplicate", "margin", "window")


def _plain(text: str) -> str:
    """A text without differences in white space and case, which do not make it another text."""
    return " ".join(text.split()).casefold()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(_plain(text).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class MiningRules:
    """How a pair's negatives are chosen from its ranked candidates; NV-Retriever (arXiv 2407.15831)."""

    negatives: int
    first: int
    """Rank of the first candidate that may be taken, counted from 1, without excluded documents."""

    last: int
    margin_percent: float | None = None
    margin_absolute: float | None = None
    sample: Literal["top", "random"] = "top"
    seed: int = 0

    def limit(self, positive_score: float) -> float:
        """The highest score that a negative may have: TopK-PercPos or TopK-MarginPos; infinity without a margin."""
        if self.margin_percent is not None:
            # a share of a negative score is higher than the score itself
            return min(self.margin_percent * positive_score, positive_score)
        return float("inf") if self.margin_absolute is None else positive_score - self.margin_absolute


@dataclass(frozen=True, slots=True)
class Negative:
    """A mined negative: its row, its rank among the candidates, and its score."""

    row: int
    rank: int
    score: float


@dataclass(slots=True)
class Candidates:
    """Pairs, documents in rows, and which documents are excluded for which pair."""

    pairs: list[Pair]
    """As read, but without negatives, and with the corpus's id for each positive whose text the corpus has."""

    listed_positives: int
    """Negatives of the input that were positives of the same pair."""

    num_documents: int
    """Documents in the corpus, before equal texts are merged."""

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_searchable: int = 0
    brought: dict[str, str] = field(default_factory=dict)
    """Texts of the positives that are not in the corpus, by id."""

    _twins: dict[int, list[str]] = field(default_factory=dict)
    """Row to the ids of the other documents with its text."""

    _rows: dict[str, int] = field(default_factory=dict)
    """Row of every positive."""

    _search_rows: dict[str, int] = field(default_factory=dict)
    """Positive to the searchable row that has its text, if there is one."""

    _related: dict[str, dict[str, None]] = field(default_factory=dict)
    """Query text to the positives of all pairs with this query."""

    @staticmethod
    def read(pairs: str | Path, documents: str | Path, say: Say = silent, columns: Columns | None = None) -> Candidates:
        """Read both files; raises DataError if one cannot be used, see `read_corpus` and `read_pairs`."""
        say(f"reading {documents} and {pairs}")
        corpus = read_corpus(documents, columns)
        found = read_pairs(pairs, corpus, columns)
        brought = {name: text for name, text in found.documents.items() if name not in corpus}
        wanted = set(brought.values())
        known: dict[str, str] = {}
        for name, text in corpus.items():
            if text in wanted:
                known.setdefault(text, name)
        names = {name: known.get(text, name) for name, text in brought.items()}
        pairs_read = [
            replace(pair, positives=tuple(dict.fromkeys(names.get(p, p) for p in pair.positives)), negatives=())
            for pair in found.pairs
        ]
        candidates = Candidates(pairs_read, found.dropped_negatives, len(corpus))
        candidates._add(corpus, found.documents)
        return candidates

    def _add(self, corpus: dict[str, str], named: dict[str, str]) -> None:
        for pair in self.pairs:
            self._related.setdefault(_plain(pair.query), {}).update(dict.fromkeys(pair.positives))
        positives = {name for related in self._related.values() for name in related}
        rows: dict[bytes, int] = {}
        for name, text in corpus.items():
            row = rows.setdefault(_digest(text), len(self.ids))
            if row == len(self.ids):
                self.ids.append(name)
                self.texts.append(text)
                if name in positives:
                    self._rows[name] = row
            else:
                self._twins.setdefault(row, []).append(name)
        self.num_searchable = len(self.ids)
        for name in (name for pair in self.pairs for name in pair.positives):
            text = corpus.get(name) or named[name]
            row = rows.get(_digest(text), -1)
            if row >= 0:
                self._search_rows[name] = row
            if name not in corpus:
                self.brought[name] = text
            if name not in self._rows:
                self._rows[name] = len(self.ids)
                self.ids.append(name)
                self.texts.append(text)

    def positive_rows(self, number: int) -> list[int]:
        """The rows of a pair's positives."""
        return [self._rows[name] for name in self.pairs[number].positives]

    def excluded(self, number: int) -> set[int]:
        """Searchable rows that have the text of a positive of the pair, or of another pair with its query."""
        related = self._related[_plain(self.pairs[number].query)]
        return {self._search_rows[name] for name in related if name in self._search_rows}

    def depth(self, number: int, last: int) -> int:
        """How many documents must be searched so that `last` candidates are among them."""
        return min(self.num_searchable, last + len(self.excluded(number)))

    def most_candidates(self) -> int:
        """The number of candidates of the pair that has the most."""
        return self.num_searchable - min(len(self.excluded(i)) for i in range(len(self.pairs)))

    def choose(
        self, number: int, positive_score: float, ranked: Iterable[tuple[int, float]], rules: MiningRules
    ) -> tuple[list[Negative], Counter[str]]:
        """A pair's negatives, best first, and how many documents were dropped for each of `REASONS`.

        Args:
            number: which pair.
            positive_score: the lowest score of its positives, since training may pair the negatives with any.
            ranked: rows and scores, best first, at least `depth` of them if there are that many.
            rules: margin, window and number.
        """
        pair, excluded, limit = self.pairs[number], self.excluded(number), rules.limit(positive_score)
        dropped: Counter[str] = Counter()
        kept: list[Negative] = []
        rank = 0
        for row, score in ranked:
            if row in excluded:
                dropped.update(self._why(pair, row))
                continue
            rank += 1
            if rank > rules.last:
                break
            dropped["duplicate"] += len(self._twins.get(row, ()))
            if rank < rules.first:
                dropped["window"] += 1
            elif score > limit:
                dropped["margin"] += 1
            else:
                kept.append(Negative(row, rank, score))
        if rules.sample == "random" and len(kept) > rules.negatives:
            # seeded per pair: the result depends neither on other pairs nor on the number of ranks
            kept = random.Random(f"{rules.seed}/{pair.id}").sample(kept, rules.negatives)
            kept.sort(key=lambda negative: negative.rank)
        return kept[: rules.negatives], dropped

    def _why(self, pair: Pair, row: int) -> list[str]:
        """The reason for each document with the text of an excluded row."""
        related = self._related[_plain(pair.query)]
        names = (self.ids[row], *self._twins.get(row, ()))
        return [
            "positive" if name in pair.positives else "other positive" if name in related else "same text"
            for name in names
        ]
