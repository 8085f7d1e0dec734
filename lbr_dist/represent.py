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
from dataclasses import dataclass

from torch import Tensor

from lbr_dist.config import RepresentConfig, RunConfig
from lbr_dist.config_stages import MIN_TEMPERATURE
from lbr_dist.contrast import Contrast
from lbr_dist.data.packing import PackedRow, Sequence, assign_rows, filler, pack_row
from lbr_dist.data.pairs import PairBatch, load_pairs
from lbr_dist.distributed import Ranks, largest
from lbr_dist.engine import Engine
from lbr_dist.errors import TrainingError
from lbr_dist.exchange import Exchange
from lbr_dist.export import export
from lbr_dist.grad_cache import forward_backward, surrogate
from lbr_dist.model.tokens import EmbeddingSettings, TextTokenizer
from lbr_dist.plan import StepPlanner
from lbr_dist.trainer import load_engine, train, write_summary


@dataclass(frozen=True, slots=True)
class Chunks:
    """How the texts of a global batch are shared out: every rank knows every rank's chunks."""

    rows: list[list[list[int]]]
    """Rank, chunk, numbers of its texts; as many chunks on every rank, some perhaps empty."""

    tokens: list[int]
    """Tokens of each chunk on the rank where it has the most."""

    def members(self, rank: int) -> list[int]:
        """The texts of a rank, in the order in which it embeds them."""
        return [text for row in self.rows[rank] for text in row]


def share_out(batch: PairBatch, bottleneck: int, chunk_tokens: int, separate: bool, world_size: int) -> Chunks:
    """Chunks of up to `chunk_tokens` tokens, evenly filled: a function of its arguments alone."""
    lengths = [1 + len(text) + bottleneck for text in batch.texts]
    everything = range(len(lengths))
    sides = [everything[: len(batch.queries)], everything[len(batch.queries) :]] if separate else [everything]
    rows: list[list[int]] = []
    for side in sides:
        assigned = assign_rows([lengths[text] for text in side], chunk_tokens, multiple=world_size)
        rows += [[side[i] for i in row] for row in assigned]
    tokens = [sum(lengths[text] for text in row) for row in rows]
    return Chunks(
        [rows[rank::world_size] for rank in range(world_size)],
        [max(tokens[i : i + world_size]) for i in range(0, len(tokens), world_size)],
    )


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
        self._check_agreement(batches)
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
        k, chunk_tokens = self.config.model.bottleneck_tokens, self.planner.chunk_tokens
        plan = share_out(batch, k, chunk_tokens, settings.separate_sides, ranks.world_size)
        kept = self.planner.kept(plan.tokens)
        texts, rows = batch.texts, plan.rows[ranks.rank]
        members = [plan.members(rank) for rank in range(ranks.world_size)]
        contrast = Contrast(batch, members, settings, self.exchange, weight)

        def chunk(number: int) -> PackedRow:
            if not rows[number]:
                return filler(k, self.sink_id).to(ranks.device)
            return pack_row([Sequence(texts[i], k) for i in rows[number]], self.sink_id).to(ranks.device)

        scale: Tensor | None = None
        if settings.learn_temperature:
            scale = self.engine(None, task="temperature")
            contrast.temperature = scale.detach().exp().clamp(min=MIN_TEMPERATURE)
        forward_backward(
            self.engine, chunk, len(rows), kept, contrast.build_cache, f"{key}/{ranks.rank}", pooling=settings.pooling
        )
        values = contrast.measured | {"kept_graphs": float(kept), "chunks": float(len(rows))}
        if scale is not None:
            # d loss / d log t = t * d loss / d t, of this rank's queries; reduced with all other gradients
            self.engine.backward(surrogate(scale, contrast.temperature_gradient * contrast.temperature))
            values["temperature"] = float(contrast.temperature)
        return values

    def _check_agreement(self, batches: list[PairBatch]) -> None:
        digests = [batch.digest for batch in batches]
        found = largest([*digests, *(-digest for digest in digests)], self.ranks)
        if found != [*digests, *(-digest for digest in digests)]:
            raise TrainingError(
                f"represent: the ranks disagree on the global batch; rank {self.ranks.rank} of {self.ranks.world_size} "
                f"has {digests}, the largest is {found[: len(digests)]}. Give every node the same files, config and "
                "versions."
            )


def represent(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 2 on every rank, from stage 1's export where there is one, and export the finished model.

    Raises:
        DataError, ModelError, CheckpointError, TrainingError: see the messages.
    """
    began = time.perf_counter()
    base = config.stage_base("represent")
    tokenizer = TextTokenizer(base)
    pairs = load_pairs(config, tokenizer)
    if pairs.dropped_negatives and ranks.is_first:
        message = f"represent: {pairs.dropped_negatives:,} listed negatives answer their own query and were left out"
        print(message, file=sys.stderr, flush=True)
    engine, model = load_engine(config, base, tokenizer, "represent", ranks)
    contrastive = ContrastiveStep(engine, config, tokenizer.sink_id, ranks)
    accum = config.represent.grad_accum

    def batches(step: int) -> list[PairBatch]:
        return [pairs.batch(config.represent, step * accum + i, config.seed) for i in range(accum)]

    def run_step(step: int) -> dict[str, float]:
        return contrastive.accumulate(batches(step), f"{config.seed}/{step}")

    def batch_digest(step: int) -> str:
        return "-".join(f"{batch.digest:016x}" for batch in batches(step))

    train("represent", config, ranks, engine, run_step, batch_digest)
    settings = EmbeddingSettings.of(config.data, config.represent.pooling)
    export(model, tokenizer, settings, config, config.model_path, ranks)
    write_summary(config.stage_path("represent"), config, ranks, time.perf_counter() - began)
    engine.close()
