"""Stage 1, learn: causal language modelling through the bottleneck, on domain text.

    L_learn = mean over target tokens of -log p(y_t | bottleneck, y_<t)
            + text_weight x mean over text tokens of -log p(x_i | x_<i)
            + kl_weight   x mean over bottleneck tokens of their divergence from a unit normal (`reinject` only)
            + z_loss      x mean over scored tokens of the squared log-normaliser

The means are over the tokens of the **global** batch, so that the gradient does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbr_dist.config import LearnConfig, RunConfig
from lbr_dist.console import say_aside, silent
from lbr_dist.data.packing import PackedRow, TrainingSequence, digest, rank_rows
from lbr_dist.data.records import read_corpus, read_pairs
from lbr_dist.data.sampler import seed_of
from lbr_dist.data.targets import LearnData
from lbr_dist.data.token_cache.build import token_cache
from lbr_dist.data.token_cache.cache import Tokens, learn_texts
from lbr_dist.engine import Engine
from lbr_dist.heldout.texts import Diagnostics
from lbr_dist.model.bottleneck import LBRModel, LossWeights
from lbr_dist.ranks.group import Ranks, total
from lbr_dist.trainer import Stage, run


def unit_noise(row: PackedRow, dimension: int, key: str) -> Tensor:
    """``[bottleneck tokens, dimension]`` float32, unit normal: a function of `key` and of each sequence's place in
    the global batch, so that it does not depend on the number of ranks."""
    drawn = []
    for place in row.order.tolist() or [-1]:  # a filler row holds one sequence that has no place in the batch
        generator = torch.Generator().manual_seed(seed_of(f"{key}/{place}"))
        drawn.append(torch.randn(row.layout.bottleneck, dimension, generator=generator))
    return torch.cat(drawn)


def accumulate_step(
    engine: Engine,
    sequences: list[TrainingSequence],
    learn: LearnConfig,
    sink_id: int,
    ranks: Ranks,
    noise_key: str = "",
) -> dict[str, float]:
    """Accumulate the gradient of one global batch, reduced once.

    Args:
        engine: an `LBRModel` under ZeRO-3.
        sequences: the **global** batch, the same on every rank.
        learn: form, weights and row size.
        sink_id: the token that every sequence begins with.
        ranks: this process among its peers.
        noise_key: seeds the noise of a variational bottleneck; different for each step.

    Returns:
        The global batch's losses and token counts, the same on every rank.
    """
    rows, filled = rank_rows(sequences, learn.row_tokens, sink_id, ranks.rank, ranks.world_size)
    text_tokens = max(1, sum(max(0, len(s.context) - 1) for s in sequences))
    target_tokens = max(1, sum(len(s.target) for s in sequences))
    scored = text_tokens + (target_tokens if learn.bottleneck != "none" else 0)
    weights = LossWeights(
        # without a bottleneck, the text's loss is the only one
        text=(1.0 if learn.bottleneck == "none" else learn.text_weight) / text_tokens,
        target=1.0 / target_tokens,
        z=learn.z_loss / scored,
        kl=learn.kl_weight / max(1, sum(s.bottleneck for s in sequences)),
    )
    sums, losses = [0.0] * 5, 0.0
    with engine.accumulate(hold=engine.fits_whole):
        for row in rows:
            options: dict[str, Any] = {"form": learn.bottleneck, "weights": weights}
            if learn.kl_weight:
                options["noise"] = unit_noise(row, engine.dimension, noise_key).to(ranks.device)
            loss, parts = engine(row.to(ranks.device), task="learn", **options)
            engine.backward(loss)
            sums = [a + b for a, b in zip(sums, parts.tolist(), strict=True)]
            losses += float(loss.detach())
    loss_sum, text, target, texts, targets, divergence = total([losses, *sums], ranks)
    values = {"loss": loss_sum, "text_loss": text / max(1.0, texts)}
    if targets:
        values["target_loss"] = target / targets
    if learn.kl_weight:
        values["kl"] = divergence / max(1, sum(s.bottleneck for s in sequences))
    return values | {"num_tokens": float(sum(s.length for s in sequences)), "packing_efficiency": filled}


class Learn(Stage[list[TrainingSequence]]):
    """Stage 1 on one rank; see `trainer.Stage`.

    Raises:
        DataError: the corpus has fewer texts than a batch.
    """

    name = "learn"
    settings: LearnConfig

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.data = self._read()

    def _read(self) -> LearnData:
        """The corpus in pieces, and the training pairs if they are targets."""
        config, longest = self.config, self.settings.max_text_tokens
        cache = token_cache(config, 1, say_aside if self.ranks.is_first else silent)
        texts, held_out = learn_texts(cache, config)
        pairs: list[tuple[Tokens, Tokens]] = []
        if self.settings.targets.pair:
            columns = config.data.columns
            found = read_pairs(config.data.train, read_corpus(config.data.corpus, columns), columns)
            queries = self.tokenizer.encode([pair.query for pair in found.pairs], longest)
            documents = self.tokenizer.encode([found.documents[pair.positives[0]] for pair in found.pairs], longest)
            pairs = list(zip(queries, documents, strict=True))
        return LearnData(texts, pairs, self.tokenizer.drop_id, held_out)

    @classmethod
    def model_options(cls, config: RunConfig) -> dict[str, Any]:
        return {"variational": config.learn.kl_weight > 0}

    @classmethod
    def resident(cls, config: RunConfig, model: LBRModel) -> list[nn.Parameter]:
        # every row ends in the head
        return [model.language_loss.weight] if config.engine.resident_head else []

    def attach(self, engine: Engine) -> None:
        self.engine = engine
        self.diagnostics = Diagnostics(engine, self.data, self.config, self.tokenizer.sink_id, self.ranks)

    def batch(self, step: int) -> list[TrainingSequence]:
        return self.data.batch(self.settings, self.config.model.bottleneck_tokens, step, self.config.seed)

    def digest(self, batch: list[TrainingSequence]) -> str:
        return digest(batch)

    def accumulate(self, batch: list[TrainingSequence], step: int) -> dict[str, float]:
        noise_key = f"{self.config.seed}/{step}"
        return accumulate_step(self.engine, batch, self.settings, self.tokenizer.sink_id, self.ranks, noise_key)

    def measure(self) -> dict[str, float]:
        return self.diagnostics.measure() if self.diagnostics else {}


def learn(config: RunConfig, ranks: Ranks) -> None:
    """Run stage 1 on every rank, and export the model after it to `learn/export`.

    Raises:
        DataError, ModelError, CheckpointError, TrainingError, Interrupted: see the messages.
    """
    run(Learn(config, ranks))
