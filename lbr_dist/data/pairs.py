"""Tokenised training pairs, and the global contrastive batches built from them.

Texts are identified by their tokens: the same text under two ids is one document and is scored once. A document that
answers a query in any pair is never a negative of that query.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lbr_dist.config import DataConfig, RepresentConfig, RunConfig
from lbr_dist.data import sampler
from lbr_dist.data.records import Pair, PairSet, by_source, check_apart, check_enough, read_corpus, read_pairs
from lbr_dist.data.tokenizer import TextTokenizer

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A global contrastive batch, the same on every rank: queries, and the documents they are scored against."""

    queries: list[Tokens]
    documents: list[Tokens]
    """Without duplicates."""

    positives: list[tuple[int, ...]]
    """For each query, the columns of the documents that answer it: first the scored one, then the others (masked)."""

    query_names: list[str]
    """Ids, for messages."""

    document_names: list[str]

    @property
    def texts(self) -> list[Tokens]:
        """Queries, then documents."""
        return self.queries + self.documents

    def name(self, text: int) -> str:
        """How messages name the text at this index of `texts`."""
        queries = len(self.queries)
        if text < queries:
            return f"query {self.query_names[text]!r}"
        return f"document {self.document_names[text - queries]!r}"

    @property
    def anchors(self) -> list[tuple[int, ...]]:
        """For each query's scored document, the rows of the queries it answers: first this query, then the others."""
        rows: dict[int, list[int]] = defaultdict(list)
        for row, columns in enumerate(self.positives):
            for column in columns:
                rows[column].append(row)
        return [
            (row, *(other for other in rows[columns[0]] if other != row)) for row, columns in enumerate(self.positives)
        ]

    @property
    def digest(self) -> int:
        """A 62-bit hash: different batches get the same one only by chance."""
        hashed = hashlib.blake2b(digest_size=8)
        for rows in (self.queries, self.documents, self.positives):
            hashed.update(array("q", map(len, rows)))
            hashed.update(array("q", itertools.chain.from_iterable(rows)))
        return int.from_bytes(hashed.digest(), "little") >> 2


def padded(columns: list[tuple[int, ...]]) -> Tensor:
    """Rows of different lengths as ``[rows, longest]`` int64, padded with -1."""
    longest = max((len(row) for row in columns), default=1)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in columns], dtype=torch.int64).view(-1, longest)


@dataclass(frozen=True, slots=True)
class TrainingPairs:
    """Tokenised pairs, built by `load_pairs`, or by `load_with_dev` together with the development pairs."""

    pairs: list[Pair]
    queries: dict[str, Tokens]
    """By pair id, prompt included."""

    documents: dict[str, Tokens]
    """By document id, prompt included."""

    known: dict[Tokens, set[Tokens]]
    """Query to the texts that answer it in any pair."""

    sources: list[list[Pair]]
    """The pairs by source."""

    dropped_negatives: int
    """Negatives left out because they answer their query: same id, same text, or in another pair of the query."""

    def batch(self, settings: RepresentConfig, number: int, seed: int) -> PairBatch:
        """The global batch with this number. Depends only on settings, number and seed."""
        return self._made_of(self._draw(settings, number, seed), settings, seed)

    def once(self, settings: RepresentConfig, seed: int) -> list[PairBatch]:
        """Batches of all pairs, each once, regardless of source. They depend only on settings and seed.

        Each has `settings.batch_pairs` pairs, the last one the remainder.
        """
        size, count = settings.batch_pairs, len(self.pairs)
        drawn = [(epoch, self.pairs[item]) for epoch, item in sampler.batch(count, count, 0, seed)]
        return [self._made_of(drawn[start : start + size], settings, seed) for start in range(0, count, size)]

    def _made_of(self, drawn: list[tuple[int, Pair]], settings: RepresentConfig, seed: int) -> PairBatch:
        """The batch built from these (epoch, pair) draws."""
        chosen: list[tuple[Pair, Tokens, list[Tokens]]] = []
        names: dict[Tokens, str] = {}
        for epoch, pair in drawn:
            rng = random.Random(f"{seed}/{epoch}/{pair.id}")
            positive = rng.choice(pair.positives)
            candidates = [self.documents[name] for name in pair.negatives]
            negatives = rng.sample(range(len(candidates)), min(settings.hard_negatives, len(candidates)))
            chosen.append((pair, self.documents[positive], [candidates[i] for i in negatives]))
            names[self.documents[positive]] = positive
            names |= {candidates[i]: pair.negatives[i] for i in negatives}
        columns: dict[Tokens, int] = {}
        for _, positive_text, negative_texts in chosen:
            for text in (positive_text, *negative_texts):
                columns.setdefault(text, len(columns))
        positives = []
        for pair, positive_text, _ in chosen:
            column = columns[positive_text]
            others = {columns[text] for text in self.known[self.queries[pair.id]] if text in columns} - {column}
            positives.append((column, *sorted(others)))
        return PairBatch(
            [self.queries[pair.id] for pair, _, _ in chosen],
            list(columns),
            positives,
            [pair.id for pair, _, _ in chosen],
            [names[text] for text in columns],
        )

    def _draw(self, settings: RepresentConfig, number: int, seed: int) -> list[tuple[int, Pair]]:
        size = settings.batch_pairs
        if settings.batches == "by_source":
            source, drawn = sampler.source_batch([len(pairs) for pairs in self.sources], size, number, seed)
            return [(epoch, self.sources[source][item]) for epoch, item in drawn]
        return [(epoch, self.pairs[item]) for epoch, item in sampler.batch(len(self.pairs), size, number, seed)]


def load_pairs(config: RunConfig, tokenizer: TextTokenizer) -> TrainingPairs:
    """Read and tokenise the training pairs, with prompts.

    Raises:
        DataError: there are fewer pairs than a batch needs, or a record cannot be used.
    """
    return _tokenised(
        _read_training(config, read_corpus(config.data.corpus, config.data.columns)), config.data, tokenizer
    )


def load_with_dev(config: RunConfig, tokenizer: TextTokenizer) -> tuple[TrainingPairs, TrainingPairs | None]:
    """The training pairs, and the development pairs if stage 2 measures any. The corpus is read once.

    Raises:
        DataError: as in `load_pairs`, or a development query is also trained on.
    """
    data = config.data
    corpus = read_corpus(data.corpus, data.columns)
    found = _read_training(config, corpus)
    dev = None
    if data.dev is not None and config.represent.diagnose_every:
        held_out = read_pairs(data.dev, corpus, data.columns)
        check_apart(held_out.pairs, found.pairs, data.dev, data.train)
        dev = _tokenised(held_out, data, tokenizer)
    return _tokenised(found, data, tokenizer), dev


def _read_training(config: RunConfig, corpus: Mapping[str, str]) -> PairSet:
    found = read_pairs(config.data.train, corpus, config.data.columns)
    check_enough(found.pairs, config.represent, config.data.train)
    return found


def _tokenised(found: PairSet, data: DataConfig, tokenizer: TextTokenizer) -> TrainingPairs:
    texts = [data.query_prompt + pair.query for pair in found.pairs]
    queries = dict(zip([p.id for p in found.pairs], tokenizer.encode(texts, data.max_query_tokens), strict=True))
    texts = [data.document_prompt + text for text in found.documents.values()]
    documents = dict(zip(found.documents, tokenizer.encode(texts, data.max_document_tokens), strict=True))
    return without_false_negatives(found, queries, documents)


def without_false_negatives(found: PairSet, queries: dict[str, Tokens], documents: dict[str, Tokens]) -> TrainingPairs:
    """Leave out, and count, every listed negative that is known to answer its query."""
    known: dict[Tokens, set[Tokens]] = defaultdict(set)
    for pair in found.pairs:
        known[queries[pair.id]].update(documents[name] for name in pair.positives)
    dropped, pairs = found.dropped_negatives, []
    for pair in found.pairs:
        answers = known[queries[pair.id]]
        negatives = tuple(name for name in pair.negatives if documents[name] not in answers)
        dropped += len(pair.negatives) - len(negatives)
        pairs.append(Pair(pair.id, pair.query, pair.positives, negatives, pair.source))
    return TrainingPairs(pairs, queries, documents, dict(known), list(by_source(pairs).values()), dropped)
