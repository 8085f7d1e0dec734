"""Merges learnt after those of the base tokenizer."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models

from lbr_dist.vocabulary import merges
from lbr_dist.vocabulary.merges import Entry


def test_merges_of_new_pieces_come_after_those_of_the_base() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    after = merges.tokenizer_of(json.loads(tokenizer.to_str()), [Entry("ab", (0, 1), 1, ("a", "b"))])
    assert after.encode("ab").tokens == ["ab"]
    assert after.encode("abc").tokens == ["a", "bc"]


def test_no_merge_gives_an_existing_token() -> None:
    entries = merges.learn_merges({("a", "b", "c"): 20}, {"a": 0, "b": 1, "c": 2, "ab": 3}, 5, 10)
    assert [(entry.token, entry.base_ids, entry.merge) for entry in entries] == [
        ("bc", (1, 2), ("b", "c")),
        ("abc", (0, 1, 2), ("a", "bc")),
    ]


def test_the_most_frequent_pair_is_glued_first_and_the_others_are_recounted() -> None:
    ids = {letter: i for i, letter in enumerate("abcd")}
    entries = merges.learn_merges({("a", "b", "c"): 30, ("b", "c", "d"): 15, ("c", "d"): 5}, ids, 9, 5)
    # bc is in 45 words; once it is glued, ab is in none and cd in 5 instead of 20
    saved = [(entry.token, entry.saved) for entry in entries]
    assert saved == [("bc", 45), ("abc", 30), ("bcd", 15), ("cd", 5)]


def test_a_letter_that_repeats_is_not_counted_twice() -> None:
    # in a word of three equal letters the pair occurs twice, but is joined once
    assert [entry.saved for entry in merges.learn_merges({("a", "a", "a"): 6}, {"a": 0}, 1, 6)] == [6]
    assert merges.learn_merges({("a", "a", "a"): 6}, {"a": 0}, 1, 7) == []
