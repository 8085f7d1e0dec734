"""Reading a token cache: pieces of its documents, and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.token_cache.cache import Pieces, TokenCache
from lbr_dist.errors import DataError
from tests.unit.data.token_cache.cases import expected, made


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=12),
    st.integers(1, 15),
    st.integers(1, 17),
    st.data(),
)
def test_pieces_match_slices_of_lists(texts: list[list[int]], longest: int, shortest: int, data: st.DataObject) -> None:
    class Lists:
        lengths = np.array([len(text) for text in texts], np.uint32)

        def span(self, document: int, start: int, stop: int) -> tuple[int, ...]:
            return tuple(texts[document][start:stop])

    # as in `tests.tiny.pieces`, but with any shortest length
    cut = [tuple(text[i : i + longest]) for text in texts for i in range(0, len(text), longest)]
    truth = [piece for piece in cut if len(piece) >= shortest]
    found = Pieces(Lists(), longest, shortest)
    assert len(found) == len(truth) and list(found) == truth
    if truth:
        index = data.draw(st.integers(-len(truth), len(truth) - 1))
        assert found[index] == truth[index]
    with pytest.raises(IndexError):
        found[len(truth)]


def test_pieces_of_a_cache_match_its_texts(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    from tests.tiny import pieces

    cache = made(corpus, tokenizer, tmp_path / "cache")
    for longest in (1, 5, 16):
        assert list(Pieces(cache, longest)) == pieces(expected(tokenizer), longest)


def test_a_damaged_cache_is_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = made(corpus, tokenizer, tmp_path / "cache").folder
    part = folder / "part-00000.tokens"
    content = part.read_bytes()
    part.write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"part-00000\.tokens: found {len(content) - 2} bytes, .*Delete {folder}"):
        made(corpus, tokenizer, tmp_path / "cache")
    part.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(DataError, match=r"part-00000\.tokens: found checksum"):
        made(corpus, tokenizer, tmp_path / "cache").verify()
    part.unlink()
    with pytest.raises(DataError, match=r"part-00000\.tokens: found no file"):
        TokenCache(folder)
    part.write_bytes(content)
    lengths = np.fromfile(folder / "part-00000.lengths", "<u4")
    (lengths + (np.arange(len(lengths)) == 0)).astype("<u4").tofile(folder / "part-00000.lengths")
    with pytest.raises(DataError, match="do not add up"):
        TokenCache(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"no manifest that can be read"):
        TokenCache(folder)
