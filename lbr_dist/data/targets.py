"""Stage 1's sequences: a text, and the target to predict from its bottleneck."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lbr_dist.config import LearnConfig, TargetsConfig
from lbr_dist.data import sampler
from lbr_dist.data.packing import TrainingSequence
from lbr_dist.data.token_cache.cache import Tokens


@dataclass(frozen=True, slots=True)
class LearnData:
    """Tokenised domain text, and tokenised training pairs (query, document) for the `pair` targets."""

    texts: Sequence[Tokens]
    pairs: Sequence[tuple[Tokens, Tokens]]
    drop_id: int
    held_out: Sequence[Tokens] = field(default_factory=list)
    """Texts for the diagnostics, never trained on."""

    def batch(self, learn: LearnConfig, bottleneck: int, step: int, seed: int) -> list[TrainingSequence]:
        """The global batch of a step, in the same order on every rank."""
        chosen = sampler.batch(len(self.texts), learn.batch_texts, step, seed)
        return [
            self._sequence(learn, bottleneck, self.texts[item], random.Random(f"{seed}/{epoch}/{item}"))
            for epoch, item in chosen
        ]

    def held_out_sequences(self, learn: LearnConfig, bottleneck: int) -> list[TrainingSequence]:
        """The held-out texts with their targets, the same in every run. Targets come from the text, not from a pair."""
        kinds = learn.targets
        own = kinds.continuation + kinds.reconstruction > 0
        shares = replace(kinds, pair=0.0) if own else TargetsConfig()
        alone = replace(learn, targets=shares)
        return [self._sequence(alone, bottleneck, t, random.Random(i)) for i, t in enumerate(self.held_out)]

    def _sequence(self, learn: LearnConfig, k: int, text: Tokens, rng: random.Random) -> TrainingSequence:
        if learn.bottleneck == "none":
            return TrainingSequence(text, 0)
        shares = learn.targets
        kind = rng.random() * shares.total
        if kind < shares.continuation:
            # neither side is empty, and the text side is long enough to be informative
            cut = rng.randint(max(1, len(text) // 4), max(1, 3 * len(text) // 4))
            return TrainingSequence(text[:cut], k, text[cut:])
        if kind < shares.continuation + shares.reconstruction:
            inputs = tuple(self.drop_id if rng.random() < learn.drop_target_tokens else token for token in text)
            return TrainingSequence(text, k, text, inputs)
        query, document = rng.choice(self.pairs)
        return TrainingSequence(query, k, document) if rng.random() < 0.5 else TrainingSequence(document, k, query)
