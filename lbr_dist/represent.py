"""Stage 2, represent: contrastive training on the compressed vectors, with every rank's documents as negatives.

    L_represent = - mean over queries of log ( exp(s(q, d+) / t) / sum over d in D exp(s(q, d) / t) )

`D` is every document of the global batch, except the query's false negatives. A step:

    plan      texts to evenly filled chunks, the same number on all ranks; how many graphs are kept
    pass 1    representations                                              grad_cache.py
    loss      one all-gather; each rank scores its own queries against all documents; one reduce-scatter
    pass 2    gradients of the chunks                                      grad_cache.py
    reduce    the parameters' gradients, once
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lbr_dist.config import RepresentConfig, RunConfig
from lbr_dist.console import say_aside
from lbr_dist.contrastive.chunks import RankChunks
from lbr_dist.contrastive.exchange import Exchange
from lbr_dist.contrastive.grad_cache import forward_backward, surrogate
from lbr_dist.contrastive.loss import BatchLoss, Contrast, check_agreement, temperature_of
from lbr_dist.data.pairs import PairBatch, load_with_dev
from lbr_dist.engine import Engine
from lbr_dist.heldout.pairs import DevPairs
from lbr_dist.plan.planner import StepPlanner
from lbr_dist.ranks.group import Ranks
from lbr_dist.trainer import Stage, run


class ContrastiveStep:
    """Accumulates the gradients of global batches.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        config: the run; its `represent` section holds the settings.
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
            key: seeds dropout; different for each step.

        Returns:
            Means over the batches of the loss and of what `BatchLoss` measures, the same on every rank.

        Raises:
            TrainingError: the ranks have different batches.
            RefusedStep: a representation is zero or not finite. Nothing may be applied.
        """
        check_agreement([batch.digest for batch in batches], self.ranks)
        measured = []
        with self.engine.accumulate(hold=self.planner.resident):
            for number, batch in enumerate(batches):
                measured.append(self._accumulate_batch(batch, 1.0 / len(batches), f"{key}/{number}"))
        means = {name: sum(values[name] for values in measured) / len(batches) for name in measured[0]}
        texts = [text for batch in batches for text in batch.texts]
        tokens = sum(self.config.model.sequence_tokens(len(text)) for text in texts)
        return means | {"num_pairs": float(sum(len(b.queries) for b in batches)), "num_tokens": float(tokens)}

    def _accumulate_batch(self, batch: PairBatch, weight: float, key: str) -> dict[str, float]:
        settings, ranks = self.settings, self.ranks
        chunks = RankChunks(batch, self.config, self.planner.chunk_tokens, self.sink_id, ranks)
        kept = self.planner.kept(chunks.tokens)
        contrast = Contrast(batch, chunks.members, settings, self.exchange, weight)
        scale = self.engine(None, task="temperature") if settings.learn_temperature else None
        temperature = settings.temperature if scale is None else temperature_of(scale)
        found: BatchLoss | None = None

        def build_cache(representations: Tensor) -> Tensor:
            nonlocal found
            found = contrast.loss(representations, temperature)
            return found.gradient

        key, pooling = f"{key}/{ranks.rank}", settings.pooling
        forward_backward(self.engine, chunks.row, len(chunks), kept, build_cache, key, pooling=pooling)
        assert found is not None
        values = found.measured | {"kept_graphs": float(kept), "chunks": float(len(chunks))}
        if scale is not None:
            assert found.temperature_gradient is not None
            # d loss / d log t = t * d loss / d t, of this rank's queries; reduced with all other gradients
            self.engine.backward(surrogate(scale, found.temperature_gradient * temperature))
            values["temperature"] = float(temperature)
        return values


class Represent(Stage[list[PairBatch]]):
    """Stage 2 on one rank; see `trainer.Stage`. Its batch of a step is `represent.grad_accum` contrastive batches.

    Raises:
        DataError: there are fewer pairs than a batch, or a development query is trained on.
    """

    name = "represent"
    settings: RepresentConfig

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.pairs, self.held_out = load_with_dev(config, self.tokenizer)
        dropped = self.pairs.dropped_negatives
        if dropped and ranks.is_first:
            say_aside(f"represent: {dropped:,} listed negatives answer their own query and were left out")

    @classmethod
    def model_options(cls, config: RunConfig) -> dict[str, Any]:
        return {"temperature": config.represent.temperature if config.represent.learn_temperature else None}

    def attach(self, engine: Engine) -> None:
        sink_id = self.tokenizer.sink_id
        self.step = ContrastiveStep(engine, self.config, sink_id, self.ranks)
        exchange, chunk_tokens = self.step.exchange, self.step.planner.chunk_tokens
        self.dev = DevPairs(engine, self.held_out, self.config, sink_id, exchange, chunk_tokens)

    def batch(self, step: int) -> list[PairBatch]:
        accum = self.settings.grad_accum
        return [self.pairs.batch(self.settings, step * accum + i, self.config.seed) for i in range(accum)]

    def digest(self, batch: list[PairBatch]) -> str:
        return "-".join(f"{one.digest:016x}" for one in batch)

    def accumulate(self, batch: list[PairBatch], step: int) -> dict[str, float]:
        return self.step.accumulate(batch, f"{self.config.seed}/{step}")

    def measure(self) -> dict[str, float]:
        return self.dev.measure() if self.dev else {}


def represent(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 2 on every rank, from stage 1's export if it ran, and export the finished model.

    Raises:
        DataError, ModelError, CheckpointError, TrainingError, Interrupted: see the messages.
    """
    run(Represent(config, ranks))
