"""Stage 1's sequences: a text and what is to be predicted from its bottleneck."""

from __future__ import annotations

import random
from collections.abc import Sequence as List
from dataclasses import dataclass

from lbr_dist.config import LearnConfig
from lbr_dist.data import sampler
from lbr_dist.data.packing import Sequence

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LearnData:
    """Tokenised domain text, and tokenised training pairs (query, document) for the `pair` targets."""

    texts: List[Tokens]
    pairs: List[tuple[Tokens, Tokens]]
    drop_id: int

    def batch(self, learn: LearnConfig, bottleneck: int, step: int, seed: int) -> list[Sequence]:
        """The global batch of a step, in the same order on every rank."""
        chosen = sampler.batch(len(self.texts), learn.batch_texts, step, seed)
        return [
            self._sequence(learn, bottleneck, self.texts[item], random.Random(f"{seed}/{epoch}/{item}"))
            for epoch, item in chosen
        ]

    def _sequence(self, learn: LearnConfig, k: int, text: Tokens, rng: random.Random) -> Sequence:
        if learn.bottleneck == "none":
            return Sequence(text, 0)
        shares = learn.targets
        kind = rng.random() * shares.total
        if kind < shares.continuation:
            # neither side is empty, and the text side is long enough to say something
            cut = rng.randint(max(1, len(text) // 4), max(1, 3 * len(text) // 4))
            return Sequence(text[:cut], k, text[cut:])
        if kind < shares.continuation + shares.reconstruction:
            inputs = tuple(self.drop_id if rng.random() < learn.drop_target_tokens else token for token in text)
            return Sequence(text, k, text, inputs)
        query, document = rng.choice(self.pairs)
        return Sequence(query, k, document) if rng.random() < 0.5 else Sequence(document, k, query)


def pieces(texts: List[Tokens], longest: int) -> list[Tokens]:
    """Texts cut into pieces of at most `longest` tokens; pieces of one token, which teach nothing, are left out."""
    cut = (text[i : i + longest] for text in texts for i in range(0, len(text), longest))
    return [piece for piece in cut if len(piece) > 1]
