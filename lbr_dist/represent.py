"""Stage 2, represent: contrastive training on the compressed vectors, with every rank's documents as negatives.

    L_represent = - mean over queries of log ( exp(s(q, d+) / t) / sum over d in D exp(s(q, d) / t) )

`D` is every document of the global batch but the false negatives of the query. Each rank scores its own queries
against all documents; the documents' gradients of all ranks are summed by one reduce-scatter.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbr_dist.config import RepresentConfig, RunConfig
from lbr_dist.data import sampler
from lbr_dist.data.packing import PackedRow, Sequence, filler, pack
from lbr_dist.data.records import Pair, read_corpus, read_pairs
from lbr_dist.distributed import Ranks, gather_rows, largest, reduce_rows, share, total
from lbr_dist.engine import Engine
from lbr_dist.errors import DataError
from lbr_dist.export import export
from lbr_dist.grad_cache import forward_backward
from lbr_dist.kernels.infonce import info_nce
from lbr_dist.model.tokens import EmbeddingSettings, TextTokenizer
from lbr_dist.trainer import load_engine, train, write_summary

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A global contrastive batch, the same on every rank: queries, and the documents that are scored."""

    queries: list[Tokens]
    documents: list[Tokens]
    positives: list[int]
    """Each query's column among the documents."""

    masked: Tensor
    """``[queries, documents]`` bool, the false negatives."""


@dataclass(frozen=True, slots=True)
class RepresentData:
    """Tokenised training pairs; documents by their id."""

    pairs: list[Pair]
    queries: list[Tokens]
    documents: dict[str, Tokens]

    def batch(self, represent: RepresentConfig, step: int, seed: int) -> PairBatch:
        """The global batch of a step. A document that stands in it twice is scored once."""
        chosen = []
        for epoch, item in sampler.batch(len(self.pairs), represent.batch_pairs, step, seed):
            rng = random.Random(f"{seed}/{epoch}/{item}")
            pair = self.pairs[item]
            negatives = rng.sample(pair.negatives, min(represent.hard_negatives, len(pair.negatives)))
            chosen.append((item, rng.choice(pair.positives), negatives))
        # one column for each text: the same text under two ids would be its own negative
        columns: dict[Tokens, int] = {}
        for _, positive, negatives in chosen:
            for name in (positive, *negatives):
                columns.setdefault(self.documents[name], len(columns))
        masked = torch.zeros(len(chosen), len(columns), dtype=torch.bool)
        positives = []
        for row, (item, positive, _) in enumerate(chosen):
            column = columns[self.documents[positive]]
            others = (columns.get(self.documents[name]) for name in self.pairs[item].positives)
            masked[row, [c for c in others if c is not None and c != column]] = True
            positives.append(column)
        return PairBatch([self.queries[item] for item, _, _ in chosen], list(columns), positives, masked)


def load_data(config: RunConfig, tokenizer: TextTokenizer) -> RepresentData:
    """Tokenise the training pairs, prompts put before.

    Raises:
        DataError: fewer pairs than a batch.
    """
    data = config.data
    found = read_pairs(data.train, read_corpus(data.corpus))
    if len(found.pairs) < config.represent.batch_pairs:
        raise DataError(
            f"{data.train}: found {len(found.pairs)} pairs, represent.batch_pairs is "
            f"{config.represent.batch_pairs}. Lower represent.batch_pairs, or bring more pairs."
        )
    queries = tokenizer.encode([data.query_prompt + pair.query for pair in found.pairs], data.max_query_tokens)
    texts = [data.document_prompt + text for text in found.documents.values()]
    documents = tokenizer.encode(texts, data.max_document_tokens)
    return RepresentData(found.pairs, queries, dict(zip(found.documents, documents, strict=True)))


def rank_chunks(
    texts: list[Tokens], bottleneck: int, settings: RepresentConfig, sink_id: int, ranks: Ranks
) -> list[PackedRow]:
    """This rank's texts in chunks of `chunk_tokens`, as many chunks as the rank with the most."""
    chunks = pack([Sequence(text, bottleneck) for text in texts], settings.chunk_tokens, sink_id)
    missing = largest(max(1, len(chunks)), ranks.device) - len(chunks)
    return [chunk.to(ranks.device) for chunk in (*chunks, *[filler(bottleneck, sink_id)] * missing)]


def accumulate_step(
    engine: Engine, batch: PairBatch, bottleneck: int, settings: RepresentConfig, sink_id: int, ranks: Ranks
) -> dict[str, float]:
    """Accumulate the gradient of one global batch, reduced once.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        batch: the **global** batch, the same on every rank.
        bottleneck: k.
        settings: chunks, temperature, pooling.
        sink_id: the token that every sequence begins with.
        ranks: this process among its peers.

    Returns:
        The global batch's loss and in-batch accuracy, the same on every rank.
    """
    query_counts, document_counts = (
        [len(range(len(texts))[share(len(texts), r, ranks.world_size)]) for r in range(ranks.world_size)]
        for texts in (batch.queries, batch.documents)
    )
    my_queries = share(len(batch.queries), ranks.rank, ranks.world_size)
    my_documents = share(len(batch.documents), ranks.rank, ranks.world_size)
    texts = batch.queries[my_queries] + batch.documents[my_documents]
    chunks = rank_chunks(texts, bottleneck, settings, sink_id, ranks)
    order = torch.cat([chunk.order for chunk in chunks])  # the place of each representation among the texts
    split = query_counts[ranks.rank]
    results: list[float] = []

    def build_cache(representations: list[Tensor]) -> list[Tensor]:
        mine = torch.empty_like(torch.cat(representations))
        mine[order] = torch.cat(representations)
        queries = mine[:split].requires_grad_()
        documents = gather_rows(mine[split:].detach(), document_counts).requires_grad_()
        positives = torch.tensor(batch.positives[my_queries], dtype=torch.int64, device=ranks.device)
        masked = batch.masked[my_queries].to(ranks.device)
        loss, correct = info_nce(queries, documents, positives, masked, settings.temperature)
        (loss / len(batch.queries)).backward()  # type: ignore[no-untyped-call]
        assert queries.grad is not None and documents.grad is not None
        gradient = torch.cat([queries.grad, reduce_rows(documents.grad, document_counts, ranks.rank)])
        results.extend(total([float(loss.detach()), float(correct)], ranks.device))
        return list(gradient[order].split([len(r) for r in representations]))

    forward_backward(engine, chunks, build_cache, pooling=settings.pooling)
    loss, correct = (value / len(batch.queries) for value in results)
    return {"loss": loss, "accuracy": correct, "num_pairs": float(len(batch.queries))}


def represent(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 2 on every rank, from stage 1's export where there is one, and export the finished model.

    Raises:
        DataError, ModelError, CheckpointError: see the messages.
    """
    began = time.perf_counter()
    base = config.learn_export if config.learn.steps else Path(config.model.base)
    tokenizer = TextTokenizer(base)
    data = load_data(config, tokenizer)
    engine, model = load_engine(config, base, tokenizer, "represent")

    def run_step(step: int) -> dict[str, float]:
        batch = data.batch(config.represent, step, config.seed)
        bottleneck = config.model.bottleneck_tokens
        return accumulate_step(engine, batch, bottleneck, config.represent, tokenizer.sink_id, ranks)

    train("represent", config, ranks, engine, run_step)
    settings = EmbeddingSettings.of(config.data, config.represent.pooling)
    export(model, tokenizer, settings, config, config.model_path, ranks)
    write_summary(config.stage_path("represent"), config, ranks, time.perf_counter() - began)
    engine.close()
