"""Stage 2, represent: contrastive training on the compressed vectors, with every rank's documents as negatives.

    L_represent = - mean over queries of log ( exp(s(q, d+) / t) / sum over d in D exp(s(q, d) / t) )

`D` is every document of the global batch but the false negatives of the query. A step:

    plan      texts to chunks of as many tokens, alike on all ranks; how many graphs are kept
    pass 1    representations                                              grad_cache.py
    loss      one all-gather; each rank scores its own queries against all documents; one reduce-scatter
    pass 2    gradients of the chunks                                      grad_cache.py
    reduce    the parameters' gradients, once
"""

from __future__ import annotations

import sys
import time

from torch import Tensor

from lbr_dist.config import RepresentConfig, RunConfig
from lbr_dist.contrastive.chunks import RankChunks
from lbr_dist.contrastive.exchange import Exchange
from lbr_dist.contrastive.grad_cache import forward_backward, surrogate
from lbr_dist.contrastive.loss import Contrast, check_agreement, temperature_of
from lbr_dist.data.pairs import PairBatch, load_with_dev
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.engine import Engine
from lbr_dist.export.folder import export, stage_settings
from lbr_dist.heldout.pairs import DevPairs
from lbr_dist.plan.planner import StepPlanner
from lbr_dist.ranks.group import Ranks
from lbr_dist.trainer import load_engine, train, write_summary


class ContrastiveStep:
    """Accumulates the gradients of global batches.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        config: the run; its `represent` section says how.
        sink_id: the token that every sequence begins with.
        ranks: this process among its peers.
    """

    def __init__(self, engine: Engine, config: RunConfig, sink_id: int, ranks: Ranks) -> None:
        self.engine, self.config, self.sink_id, self.ranks = engine, config, sink_id, ranks
        self.settings: RepresentConfig = config.represent
        self.exchange = Exchange(ranks, self.settings.exchange)
        self.planner = StepPlanner.for_stage(config, ranks)

    def accumulate(self, batches: list[PairBatch], key: str) -> dict[str, float]:
        """Accumulate the mean of the batches' gradients, reduced once.

        Args:
            batches: **global** batches, the same on every rank.
            key: names what dropout draws; another one for each step.

        Returns:
            Means over the batches of the loss and of what `Contrast` measures, the same on every rank.

        Raises:
            TrainingError: the ranks have different batches.
            RefusedStep: a representation is not finite, or of no length. Nothing may be applied.
        """
        check_agreement([batch.digest for batch in batches], self.ranks)
        measured = []
        with self.engine.accumulate(hold=self.planner.resident):
            for number, batch in enumerate(batches):
                measured.append(self._accumulate_batch(batch, 1.0 / len(batches), f"{key}/{number}"))
        means = {name: sum(values[name] for values in measured) / len(batches) for name in measured[0]}
        texts = [text for batch in batches for text in batch.texts]
        tokens = sum(1 + len(text) + self.config.model.bottleneck_tokens for text in texts)
        return means | {"num_pairs": float(sum(len(b.queries) for b in batches)), "num_tokens": float(tokens)}

    def _accumulate_batch(self, batch: PairBatch, weight: float, key: str) -> dict[str, float]:
        settings, ranks = self.settings, self.ranks
        chunks = RankChunks(batch, self.config, self.planner.chunk_tokens, self.sink_id, ranks)
        kept = self.planner.kept(chunks.tokens)
        contrast = Contrast(batch, chunks.members, settings, self.exchange, weight)
        scale: Tensor | None = None
        if settings.learn_temperature:
            scale = self.engine(None, task="temperature")
            contrast.temperature = temperature_of(scale)
        key, build_cache, pooling = f"{key}/{ranks.rank}", contrast.build_cache, settings.pooling
        forward_backward(self.engine, chunks.row, len(chunks), kept, build_cache, key, pooling=pooling)
        values = contrast.measured | {"kept_graphs": float(kept), "chunks": float(len(chunks))}
        if scale is not None:
            # d loss / d log t = t * d loss / d t, of this rank's queries; reduced with all other gradients
            self.engine.backward(surrogate(scale, contrast.temperature_gradient * contrast.temperature))
            values["temperature"] = float(contrast.temperature)
        return values


def represent(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 2 on every rank, from stage 1's export where there is one, and export the finished model.

    Raises:
        DataError, ModelError, CheckpointError, TrainingError: see the messages.
    """
    began = time.perf_counter()
    base = config.stage_base("represent")
    tokenizer = TextTokenizer(base)
    pairs, held_out = load_with_dev(config, tokenizer)
    if pairs.dropped_negatives and ranks.is_first:
        message = f"represent: {pairs.dropped_negatives:,} listed negatives answer their own query and were left out"
        print(message, file=sys.stderr, flush=True)
    engine, model = load_engine(config, base, tokenizer, "represent", ranks)
    contrastive = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    exchange, chunk_tokens = contrastive.exchange, contrastive.planner.chunk_tokens
    dev = DevPairs(engine, held_out, config, tokenizer.sink_id, exchange, chunk_tokens)
    accum = config.represent.grad_accum

    def batches(step: int) -> list[PairBatch]:
        return [pairs.batch(config.represent, step * accum + i, config.seed) for i in range(accum)]

    def run_step(step: int) -> dict[str, float]:
        return contrastive.accumulate(batches(step), f"{config.seed}/{step}")

    def batch_digest(step: int) -> str:
        return "-".join(f"{batch.digest:016x}" for batch in batches(step))

    train("represent", config, ranks, engine, run_step, batch_digest, dev.measure if dev else None)
    export(model, tokenizer, stage_settings(config, "represent"), config, config.model_path, ranks)
    write_summary(config.stage_path("represent"), config, ranks, time.perf_counter() - began)
    engine.close()
