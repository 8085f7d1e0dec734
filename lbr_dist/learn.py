"""Stage 1, learn: causal language modelling through the bottleneck, on domain text.

    L_learn = mean over target tokens of -log p(y_t | bottleneck, y_<t)
            + text_weight x mean over text tokens of -log p(x_i | x_<i)

Both means are over the tokens of the **global** batch, so that the gradient does not depend on the number of ranks.
"""

from __future__ import annotations

import time
from pathlib import Path

from lbr_dist.config import LearnConfig, Pooling, RunConfig
from lbr_dist.data.packing import PackedRows, Sequence, assign_rows, pack
from lbr_dist.data.records import read_corpus, read_pairs
from lbr_dist.data.targets import LearnData, pieces
from lbr_dist.distributed import Ranks, total
from lbr_dist.engine import Engine
from lbr_dist.errors import DataError
from lbr_dist.export import export
from lbr_dist.model.tokens import EmbeddingSettings, TextTokenizer
from lbr_dist.trainer import load_engine, train, write_summary


def load_data(config: RunConfig, tokenizer: TextTokenizer) -> LearnData:
    """Tokenise the corpus, and the training pairs where they are targets.

    Raises:
        DataError: the corpus gives fewer texts than a batch.
    """
    longest = config.learn.max_text_tokens
    corpus = read_corpus(config.data.corpus)
    texts = pieces(tokenizer.encode(list(corpus.values())), longest)
    if len(texts) < config.learn.batch_texts:
        raise DataError(
            f"{config.data.corpus}: found {len(texts)} texts of two tokens or more, learn.batch_texts is "
            f"{config.learn.batch_texts}. Lower learn.batch_texts, or bring more text."
        )
    pairs = []
    if config.learn.targets.pair:
        found = read_pairs(config.data.train, corpus)
        queries = tokenizer.encode([pair.query for pair in found.pairs], longest)
        documents = tokenizer.encode([found.documents[pair.positives[0]] for pair in found.pairs], longest)
        pairs = list(zip(queries, documents, strict=True))
    return LearnData(texts, pairs, tokenizer.drop_id)


def rank_rows(sequences: list[Sequence], learn: LearnConfig, sink_id: int, rank: int, world_size: int) -> PackedRows:
    """This rank's rows of a global batch: every `world_size`-th, so that each rank has as many full ones.

    Empty rows make the number the same on every rank.
    """
    needed = len(assign_rows([s.length for s in sequences], learn.row_tokens))
    rows = pack(sequences, learn.row_tokens, sink_id, rows=-(-needed // world_size) * world_size)
    return rows.select(slice(rank, None, world_size))


def accumulate_step(
    engine: Engine, sequences: list[Sequence], learn: LearnConfig, sink_id: int, ranks: Ranks
) -> dict[str, float]:
    """Accumulate the gradient of one global batch, reduced once.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        sequences: the **global** batch, the same on every rank.
        learn: form, weights, row and micro-batch sizes.
        sink_id: the token that every sequence begins with.
        ranks: this process among its peers.

    Returns:
        The global batch's losses and token counts, the same on every rank.
    """
    rows = rank_rows(sequences, learn, sink_id, ranks.rank, ranks.world_size)
    text_tokens = sum(max(0, len(s.context) - 1) for s in sequences)
    target_tokens = sum(len(s.target) for s in sequences)
    weights = (learn.text_weight / max(1, text_tokens), 1.0 / max(1, target_tokens))
    if learn.bottleneck == "none":
        weights = (1.0 / max(1, text_tokens), 0.0)  # the text's loss is all there is
    sums = [0.0] * 4
    with engine.accumulate():
        for start in range(0, len(rows.input_ids), learn.micro_batch_rows):
            micro_batch = rows.select(slice(start, start + learn.micro_batch_rows)).to(ranks.device)
            loss, parts = engine(micro_batch, task="learn", form=learn.bottleneck, weights=weights)
            engine.backward(loss)
            sums = [a + b for a, b in zip(sums, parts.tolist(), strict=True)]
    target, text, targets, texts = total(sums, ranks.device)
    values = {"loss": target * weights[1] + text * weights[0], "text_loss": text / max(1.0, texts)}
    if targets:
        values["target_loss"] = target / targets
    return values | {"num_tokens": float(sum(s.length for s in sequences))}


def learn(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 1 on every rank, and export the model after it to `learn/export`.

    Raises:
        DataError, ModelError, CheckpointError: see the messages.
    """
    began = time.perf_counter()
    base = Path(config.model.base)
    tokenizer = TextTokenizer(base)
    data = load_data(config, tokenizer)
    engine, model = load_engine(config, base, tokenizer, config.learn.optimizer)

    def run_step(step: int) -> dict[str, float]:
        sequences = data.batch(config.learn, config.model.bottleneck_tokens, step, config.seed)
        return accumulate_step(engine, sequences, config.learn, tokenizer.sink_id, ranks)

    train("learn", config, ranks, engine, run_step)
    pooling: Pooling = "bottleneck_mean" if config.model.bottleneck_tokens else "mean"
    settings = EmbeddingSettings.of(config.data, pooling)
    export(model, tokenizer, settings, config, config.learn_export, ranks)
    write_summary(config.stage_path("learn"), config, ranks, time.perf_counter() - began)
    engine.close()
