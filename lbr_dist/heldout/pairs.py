"""What stage 2 measures on development pairs while it trains: does it find the documents of queries it never saw?

    heldout_loss       the contrastive loss, a mean over the queries
    heldout_accuracy   share of the queries whose document comes first
    heldout_mrr        mean reciprocal rank of their documents; 0 below rank 10

Each query is scored against the documents of its batch. The batches are the same whenever they are measured, so that
the figures of two checkpoints compare; those of another `represent.batch_pairs` do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lbr_dist.config import RunConfig
from lbr_dist.contrastive.chunks import RankChunks
from lbr_dist.contrastive.exchange import Exchange
from lbr_dist.contrastive.loss import Contrast, Scored, check_agreement, temperature_of
from lbr_dist.data.pairs import PairBatch, TrainingPairs
from lbr_dist.engine import Engine
from lbr_dist.ranks.group import total

LAST_RANK = 10
"""A lower rank adds nothing to the mean reciprocal rank."""

QUERY_BLOCK = 256


def ranks_of_positives(queries: Tensor, documents: Tensor, positives: Tensor) -> Tensor:
    """The rank of each query's document by cosine, from 1; it comes last among documents with the same score.

    Args:
        queries: ``[q, d]`` float32.
        documents: ``[n, d]`` float32.
        positives: ``[q, p]`` int64 columns, padded with -1: column 0 is ranked, the others are left out.

    Returns:
        ``[q]`` int64. A vector that is not finite ranks last.
    """
    documents = F.normalize(documents, dim=1)
    found = []
    for block, columns in zip(queries.split(QUERY_BLOCK), positives.split(QUERY_BLOCK), strict=True):
        scores = F.normalize(block, dim=1) @ documents.T
        own = scores.gather(1, columns[:, :1])
        row, slot = (columns >= 0).nonzero(as_tuple=True)
        scores[row, columns[row, slot]] = -math.inf
        # not `scores >= own`: nan would come first
        found.append(1 + (~(scores < own)).sum(1))
    return torch.cat(found)


class DevPairs:
    """The held-out measurements of stage 2; false if there is nothing to measure. Building it is a collective.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        pairs: the development pairs, or None.
        config: the run; its `represent` section says how pairs are scored.
        sink_id: the token that every sequence begins with.
        exchange: sends every rank's representations to every rank.
        chunk_tokens: tokens that one rank runs at a time.

    Raises:
        TrainingError: the ranks have different pairs.
    """

    def __init__(
        self,
        engine: Engine,
        pairs: TrainingPairs | None,
        config: RunConfig,
        sink_id: int,
        exchange: Exchange,
        chunk_tokens: int,
    ) -> None:
        self.engine, self.config, self.sink_id = engine, config, sink_id
        self.exchange, self.ranks, self.chunk_tokens = exchange, exchange.ranks, chunk_tokens
        self.batches: list[PairBatch] = []
        if pairs is not None and config.represent.diagnose_every:
            self.batches = pairs.once(config.represent, config.seed)
            check_agreement([sum(batch.digest for batch in self.batches) % 2**62], self.ranks, "the dev pairs")

    def __bool__(self) -> bool:
        return bool(self.batches)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All measurements, the same on every rank; the model is in evaluation mode."""
        settings = self.config.represent
        temperature: float | Tensor = settings.temperature
        if settings.learn_temperature:
            temperature = temperature_of(self.engine(None, task="temperature"))
        # the widest prefix, as in the accuracy that training logs
        width = max(settings.prefixes, default=self.engine.dimension)
        loss = first = reciprocal = 0.0
        for batch in self.batches:
            scored = self._score(batch, temperature)
            places = ranks_of_positives(scored.queries[:, :width], scored.documents[:, :width], scored.positives)
            loss += float(scored.loss)
            first += int((places == 1).sum())
            reciprocal += float((1.0 / places.double())[places <= LAST_RANK].sum())
        count = sum(len(batch.queries) for batch in self.batches)
        loss, first, reciprocal = total([loss, first, reciprocal], self.ranks)
        return {"heldout_loss": loss / count, "heldout_accuracy": first / count, "heldout_mrr": reciprocal / count}

    def _score(self, batch: PairBatch, temperature: float | Tensor) -> Scored:
        chunks = RankChunks(batch, self.config, self.chunk_tokens, self.sink_id, self.ranks)
        contrast = Contrast(batch, chunks.members, self.config.represent, self.exchange)
        pooling = self.config.represent.pooling
        vectors = [self.engine(chunks.row(number), task="embed", pooling=pooling) for number in range(len(chunks))]
        return contrast.score(torch.cat(vectors), temperature)
