"""Stage 1's sequences: the three kinds of target, in the right shares, the same on every rank."""

from __future__ import annotations

import dataclasses

import numpy as np

from lbr_dist.config import LearnConfig, TargetsConfig
from lbr_dist.data.targets import LearnData
from lbr_dist.data.token_cache.cache import split
from tests import tiny

TEXTS = [tuple(range(100 * i, 100 * i + 7 + i)) for i in range(40)]
PAIRS = [((1, 2), (3, 4, 5)), ((6,), (7, 8))]
DROP = -7


def made(**targets: float) -> list:
    data = LearnData(TEXTS, PAIRS, DROP)
    shares = TargetsConfig(**({"continuation": 0.0, "reconstruction": 0.0} | targets))
    return data.batch(LearnConfig(batch_texts=40, targets=shares, drop_target_tokens=0.3), 4, step=2, seed=1)


def test_continuation() -> None:
    cuts = set()
    for s in made(continuation=1.0):
        assert s.context + s.target in TEXTS and s.context and s.target and s.target_inputs is None
        cuts.add(len(s.context) / len(s.context + s.target))
    assert len(cuts) > 5 and min(cuts) < 0.4 and max(cuts) > 0.6


def test_reconstruction() -> None:
    dropped = total = 0
    for s in made(reconstruction=1.0):
        assert s.context == s.target and s.target_inputs is not None
        assert all(fed in (token, DROP) for fed, token in zip(s.target_inputs, s.target, strict=True))
        dropped += s.target_inputs.count(DROP)
        total += len(s.target)
    assert 0.2 < dropped / total < 0.4


def test_pairs_go_both_ways() -> None:
    seen = {(s.context, s.target) for s in made(pair=1.0)}
    assert seen == {*PAIRS, *((d, q) for q, d in PAIRS)}


def test_mixture_and_repeatability() -> None:
    batch = made(continuation=1.0, reconstruction=1.0)
    share = sum(s.target_inputs is not None for s in batch) / len(batch)
    assert 0.25 < share < 0.75
    assert batch == made(continuation=1.0, reconstruction=1.0)


def test_without_a_bottleneck_a_sequence_is_only_the_text() -> None:
    data = LearnData(TEXTS, PAIRS, DROP)
    learn = dataclasses.replace(LearnConfig(batch_texts=40), bottleneck="none")
    batch = data.batch(learn, 4, step=0, seed=1)
    assert sorted(s.context for s in batch) == TEXTS
    assert all(s.bottleneck == 0 and not s.target for s in batch)


class Kept:
    """Documents in memory."""

    def __init__(self, texts: list[tuple[int, ...]]) -> None:
        self.texts = texts
        self.lengths = np.array([len(text) for text in texts], dtype=np.uint32)

    def span(self, document: int, start: int, stop: int) -> tuple[int, ...]:
        return self.texts[document][start:stop]


def test_held_out_texts_come_from_documents_never_trained_on() -> None:
    documents = Kept([tuple(range(1000 * i, 1000 * i + 1 + i % 9)) for i in range(90)])
    texts, held_out = split(documents, longest=4, held_out=64)
    trained = {text[0] // 1000 for text in texts}
    kept = {text[0] // 1000 for text in held_out}
    assert len(documents.lengths) // 20 == 4 >= len(held_out) > 1
    assert all(1 < len(text) <= 4 for text in held_out)
    assert not trained & kept
    assert trained | kept == {i for i in range(90) if i % 9}, "only texts of one token are in neither"
    assert texts.num_too_short == sum(len(text) == 1 for text in documents.texts) - (4 - len(held_out))
    assert split(documents, 4, 64)[1] == held_out, "the same in every run"
    every, none = split(documents, 4, 0)
    assert not none and len(every) == sum(len(tiny.pieces([text], 4)) for text in documents.texts)


def test_held_out_sequences_use_only_their_own_text() -> None:
    data = LearnData(TEXTS, PAIRS, DROP, TEXTS[:9])
    learn = LearnConfig(targets=TargetsConfig(continuation=0.0, reconstruction=0.0, pair=1.0))
    for text, s in zip(TEXTS, data.held_out_sequences(learn, 4), strict=False):
        assert s.target and (s.context + s.target == text or s.context == s.target == text)
    assert data.held_out_sequences(learn, 4) == data.held_out_sequences(learn, 4)
