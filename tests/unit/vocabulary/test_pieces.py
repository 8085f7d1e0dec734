"""Which pieces become tokens, glued or matched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.vocabulary import merges, pieces


def test_glued_tokens_are_base_tokens_joined_together(tiny_model: Path, corpora: dict[str, Path]) -> None:
    content = merges.bpe_content(tiny_model, TextTokenizer(tiny_model).hf.backend_tokenizer)  # type: ignore[attr-defined]
    texts = [json.loads(line)["text"] for line in corpora["prose"].read_text().splitlines()]
    entries = [entry for entry in pieces.choose(content, texts, 40, 10, print) if entry.merge]
    after = merges.tokenizer_of(content, entries)
    stands_for = {after.token_to_id(entry.token): entry.base_ids for entry in entries}
    before = TextTokenizer(tiny_model).encode(texts)
    for text, expected in zip(texts, before, strict=True):
        ids = after.encode(text, add_special_tokens=False).ids
        assert len(ids) < len(expected)
        assert tuple(old for i in ids for old in stands_for.get(i, (i,))) == expected


@pytest.mark.parametrize("count", [5, 20, 60])
def test_a_piece_is_kept_with_those_it_is_glued_from(tiny_model: Path, corpora: dict[str, Path], count: int) -> None:
    content = merges.bpe_content(tiny_model, TextTokenizer(tiny_model).hf.backend_tokenizer)  # type: ignore[attr-defined]
    texts = [json.loads(line)["text"] for name in ("prose", "code") for line in corpora[name].read_text().splitlines()]
    known = set(TextTokenizer(tiny_model).hf.get_vocab())
    for entry in pieces.choose(content, texts, count, 10, print):
        assert set(entry.merge or ()) <= known
        known.add(entry.token)


def test_a_piece_that_hides_a_special_token_is_not_matched() -> None:
    assert pieces._overlap("x<|im", "<|im_end|>")
    assert pieces._overlap("|>", "<|im_end|>")
    assert pieces._overlap("a<s>", "<s>")
    assert not pieces._overlap("C(=O)O", "<|im_end|>")


def test_a_piece_must_save_in_nearly_every_place() -> None:
    base = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, ":": 2, "ab": 3}, merges=[("a", "b")]))
    base.pre_tokenizer = pre_tokenizers.Punctuation()
    # "ab:" is ab + :, and with "b:" it is a + b:, which saves nothing; in "b:" alone it saves one token
    assert pieces._saved_alone(base, {"b:"}, ["ab:"]) == {}
    assert pieces._saved_alone(base, {"b:"}, ["b:"]) == {"b:": 1.0}
    assert pieces._saved_alone(base, {"b:"}, ["b:"] * 19 + ["ab:"]) == {"b:": 0.95}
    assert pieces._saved_alone(base, {"b:"}, ["b:"] * 18 + ["ab:"] * 2) == {}


def test_short_pieces_inherit_the_uses_of_longer_ones() -> None:
    saved, uses = pieces._without(["(=O)", "C(=O)C"], {"(=O)": 2, "C(=O)C": 9}, {"(=O)": 2, "C(=O)C": 4})
    assert uses == {"(=O)": 11, "C(=O)C": 9}
    assert saved == {"(=O)": 2, "C(=O)C": 2}


def test_nothing_is_matched_if_that_changes_the_text_around_it(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert pieces._keeps_surroundings(merges.bpe_content(tiny_model, tokenizer), "(=O)")
    tokenizer.normalizer = normalizers.Prepend(" ")  # type: ignore[assignment]
    assert not pieces._keeps_surroundings(merges.bpe_content(tiny_model, tokenizer), "(=O)")
