"""What stage 1 measures on held-out text while it trains: is the bottleneck used, and is the domain learned?

    heldout_target_loss            of the target through its own text's bottleneck, nats per token
    heldout_target_loss_shuffled   through the bottleneck of another text
    heldout_target_loss_without    with no bottleneck at all
    heldout_perplexity             of the text itself
    effective_rank                 of the texts' pooled vectors

If the three losses agree, the bottleneck is ignored.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lbr_dist.config import Pooling, RunConfig
from lbr_dist.data.packing import TrainingSequence, rank_rows
from lbr_dist.data.targets import LearnData
from lbr_dist.engine import Engine
from lbr_dist.model.bottleneck import LossWeights
from lbr_dist.ranks.group import Ranks, add_up, total


def effective_rank(vectors: Tensor) -> float:
    """``exp`` of the entropy of the singular values' shares; at most ``min(vectors.shape)``.

    Args:
        vectors: ``[texts, d]``, unit-norm, so that long vectors don't dominate; centred here.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).double())
    shares = values / values.sum().clamp(min=1e-300)
    return math.exp(float(-(shares * shares.clamp(min=1e-300).log()).sum()))


class Diagnostics:
    """The held-out measurements of stage 1; false if there is nothing to measure."""

    def __init__(self, engine: Engine, data: LearnData, config: RunConfig, sink_id: int, ranks: Ranks) -> None:
        self.engine, self.config, self.sink_id, self.ranks = engine, config, sink_id, ranks
        k = config.model.bottleneck_tokens
        self.texts = [TrainingSequence(text, k) for text in data.held_out]
        through = [s for s in data.held_out_sequences(config.learn, k) if s.target]
        self.targets: dict[str, list[TrainingSequence]] = {}
        if through:
            others = [*through[1:], through[0]]
            shuffled = [replace(s, context=other.context) for s, other in zip(through, others, strict=True)]
            without = [replace(s, context=(), bottleneck=0) for s in through]
            self.targets = {"": through, "_shuffled": shuffled, "_without": without}

    def __bool__(self) -> bool:
        return bool(self.texts) and self.config.learn.diagnose_every > 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All measurements, the same on every rank; the model is in evaluation mode."""
        values = {}
        for name, sequences in self.targets.items():
            # without a bottleneck nothing is injected: the plain causal form
            form = "mask" if name == "_without" else self.config.learn.bottleneck
            values[f"heldout_target_loss{name}"] = self._losses(sequences, form)[1]
        values["heldout_perplexity"] = math.exp(min(80.0, self._losses(self.texts, "mask")[0]))
        vectors = self._vectors()
        values["effective_rank"] = effective_rank(vectors)
        values["effective_rank_limit"] = float(min(len(vectors) - 1, vectors.shape[1]))
        return values

    def _losses(self, sequences: list[TrainingSequence], form: str) -> tuple[float, float]:
        """Mean losses of the text's and of the target's tokens."""
        rows, _ = rank_rows(
            sequences, self.config.learn.row_tokens, self.sink_id, self.ranks.rank, self.ranks.world_size
        )
        sums = [0.0] * 5
        for row in rows:
            _, parts = self.engine(row.to(self.ranks.device), task="learn", form=form, weights=LossWeights(1.0, 1.0))
            sums = [a + b for a, b in zip(sums, parts.tolist(), strict=True)]
        text, target, texts, targets, _ = total(sums, self.ranks)
        return text / max(1.0, texts), target / max(1.0, targets)

    def _vectors(self) -> Tensor:
        """``[texts, d]`` float32, unit-norm, in the order of the texts, on every rank."""
        pooling: Pooling = "bottleneck_mean" if self.config.model.bottleneck_tokens else "mean"
        rows, _ = rank_rows(
            self.texts, self.config.learn.row_tokens, self.sink_id, self.ranks.rank, self.ranks.world_size
        )
        vectors = torch.zeros(len(self.texts), self.engine.dimension, device=self.ranks.device)
        for row in rows:
            vectors[row.order] = self.engine(row.to(self.ranks.device), task="embed", pooling=pooling)
        add_up(vectors, self.ranks)  # each text is embedded by one rank
        return torch.nn.functional.normalize(vectors, dim=1).cpu()
