"""Chooses the pieces of a domain's text that save most tokens when a BPE tokenizer gets them as new tokens.

glued      within one word of the tokenizer: a merge after all of its own (merges.py).
matched    across several words (`C(=O)O`), which BPE could never reach: an added token, found in the raw text before
           anything else. Sentencepiece proposes these.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from tokenizers import Tokenizer

from lbr_dist.console import Say
from lbr_dist.errors import DataError
from lbr_dist.vocabulary.merges import Content, Entry, encoded, glued, restores, tokenizer_of

CANDIDATES = 50_000
"""Pieces that sentencepiece proposes."""

_PROPOSED, _TRIED = 4_000_000, 2_000_000  # characters; sentencepiece takes a minute for 4 million of SMILES
_LONGEST = 24  # characters of a matched piece
_TRIALS = 20  # places in which a matched piece is tried on its own
_PRINTABLE = re.compile(r"[!-~]+")
_UNLIKE_A_WORD = re.compile(r"[^\w\s]|[A-Za-z]\d+[A-Za-z]|\d[A-Za-z]+\d")


def choose(content: Content, texts: Sequence[str], pieces: int, min_count: int, say: Say) -> list[Entry]:
    """Exactly `pieces` entries, those of both kinds that save most; merges in the order that they must have.

    Raises:
        DataError: the texts don't give that many.
    """
    proposals = _proposals(texts, say)
    spanning = matched(content, texts, proposals, pieces, min_count, say)
    say(f"gluing: joining pairs within words, up to {pieces:,} times")
    joined = glued(content, spanning, texts, pieces, min_count)
    if len(spanning) + len(joined) < pieces:
        raise DataError(
            f"pieces = {pieces}: the corpus gives at most {len(spanning) + len(joined)} that save {min_count} tokens "
            "or more. Ask for no more than that, give more text, or lower min_count."
        )
    # a piece saves at least as much as those glued from it, and sorting is stable: parts come before what uses them
    return sorted(joined + spanning, key=lambda entry: -entry.saved)[:pieces]


def first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first texts, until they have `characters` characters in total."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    return [len(each.ids) for each in encoded(tokenizer, texts)]


def _proposals(texts: Sequence[str], say: Say) -> list[str]:
    """The pieces of a sentencepiece unigram model of the texts, spelled as in the texts."""
    import sentencepiece

    # only white space ends a piece: letters, digits and brackets alternate within a SMILES string
    lines = [line for text in first(texts, _PROPOSED) for line in text.split("\n") if line.strip()]
    say(f"sentencepiece: proposing pieces from {sum(map(len, lines)):,} characters")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=CANDIDATES,
            hard_vocab_limit=False,
            seed_sentencepiece_size=4 * CANDIDATES,
            max_sentencepiece_length=_LONGEST,
            max_sentence_length=4 * max(map(len, lines)) + 1,
            split_by_unicode_script=False,
            split_by_number=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=1,
            minloglevel=3,
            bos_id=-1,
            eos_id=-1,
        )
    except RuntimeError as error:
        raise DataError(
            f"the corpus: sentencepiece found no pieces in it ({error}), expected running text. Give more text."
        ) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if not processor.is_unknown(i)]


# ---- matched pieces -----------------------------------------------------------------------------------------------


def matched(
    content: Content,
    texts: Sequence[str],
    proposals: Iterable[str],
    limit: int,
    min_count: int,
    say: Say,
) -> list[Entry]:
    """At most `limit` pieces that span several words of the tokenizer, the most useful first.

    Pieces that save tokens on their own compete for the text, in which the longest match wins. As long as there are too
    many, the less useful half is dropped.
    """
    base = tokenizer_of(content)
    parts = _candidates(content, base, proposals)
    if not parts or not _keeps_surroundings(content, next(iter(parts))):
        return []
    chunks = Counter(chunk for text in texts for chunk in re.findall(r" ?\S+", text))
    say(f"trying {len(parts):,} pieces that span words, each on its own")
    alone = _saved_alone(base, parts, chunks)
    alive = sorted(alone)
    while True:
        say(f"counting {len(alive):,} pieces in {len(chunks):,} different strings; {limit:,} are wanted")
        uses = _uses(content, alive, chunks)
        saved, inherited = _without(alive, uses, alone)
        found = inherited if len(alive) > limit else uses
        scores = {piece: round(found[piece] * saved[piece]) for piece in alive}
        useful = sorted((p for p in alive if scores[p] >= min_count), key=lambda piece: (-scores[piece], piece))
        if len(useful) == len(alive) <= limit:
            return [Entry(piece, parts[piece], scores[piece], None) for piece in useful]
        alive = useful[: max(limit, len(useful) // 2)]


def _candidates(content: Content, base: Tokenizer, proposals: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The proposals that can be matched, with their base tokens.

    A piece with white space, or of letters and digits that don't alternate as in `c1cc`, would match within ordinary
    words and numbers. A byte-level decoder could mistake a piece that isn't ASCII for its own bytes.
    """
    known = base.get_vocab()
    fixed = [token["content"] for token in content["added_tokens"]]
    pieces = [
        piece
        for piece in proposals
        if len(piece) > 1 and _PRINTABLE.fullmatch(piece) and _UNLIKE_A_WORD.search(piece) and piece not in known
        if not any(_overlap(piece, token) for token in fixed)
    ]
    encodings = zip(pieces, encoded(base, pieces), strict=True)
    return {piece: tuple(each.ids) for piece, each in encodings if len(set(each.word_ids)) > 1}


def _overlap(piece: str, token: str) -> bool:
    """Whether, in some text, a match of the piece could keep an existing token from being found."""
    shorter = range(1, min(len(piece), len(token)))
    return piece in token or token in piece or any(piece.endswith(token[:n]) for n in shorter)


def _keeps_surroundings(content: Content, piece: str) -> bool:
    """Whether the text around a matched piece is kept; tokenizers that put a space before each part fail this."""
    tokenizer = tokenizer_of(content, [Entry(piece, (), 0, None)])
    return all(restores(tokenizer, [f"x{piece}x", f"x {piece} x", f"x{piece}{piece}x"]))


def _saved_alone(base: Tokenizer, pieces: Collection[str], chunks: Iterable[str]) -> dict[str, float]:
    """Mean tokens that each piece saves as the only new one, for the pieces that save in at least 19 of 20 places.

    This drops pieces that cut words (`value` `:` -> `valu` `e:`), since they save nothing there.
    """
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for chunk in first(chunks, _TRIED):
        for start in range(len(chunk)):
            for end in range(start + 2, min(len(chunk), start + _LONGEST) + 1):
                if (piece := chunk[start:end]) in pieces and len(places[piece]) < _TRIALS:
                    places[piece].append((chunk, start))
    flat = [
        (piece, chunk, chunk[:start], chunk[start + len(piece) :])
        for piece, found in places.items()
        for chunk, start in found
    ]
    strings = list({text for _, *texts in flat for text in texts})
    tokens = dict(zip(strings, token_counts(base, strings), strict=True))
    saved: dict[str, list[int]] = defaultdict(list)
    for piece, chunk, left, right in flat:
        saved[piece].append(tokens[chunk] - tokens[left] - 1 - tokens[right])
    return {
        piece: sum(each) / len(each) for piece, each in saved.items() if 20 * sum(n <= 0 for n in each) <= len(each)
    }


def _uses(content: Content, pieces: Sequence[str], chunks: Mapping[str, int]) -> Counter[str]:
    """How often each matched piece is found if all of them are tokens."""
    tokenizer = tokenizer_of(content, [Entry(piece, (), 0, None) for piece in pieces])
    known = set(pieces)
    uses: Counter[str] = Counter()
    for count, encoding in zip(chunks.values(), encoded(tokenizer, list(chunks)), strict=True):
        for token in encoding.tokens:
            if token in known:
                uses[token] += count
    return uses


def _without(
    pieces: Collection[str], uses: Mapping[str, int], alone: Mapping[str, float]
) -> tuple[dict[str, float], Counter[str]]:
    """Tokens that a use of each piece saves over other pieces, and its uses if longer pieces with it are dropped."""
    known = set(pieces)
    saved: dict[str, float] = {}
    inherited = Counter({piece: uses[piece] for piece in pieces})
    for piece in pieces:
        at = tokens = 0
        while at < len(piece):
            ends = range(len(piece) - (at == 0), at + 1, -1)
            end = next((n for n in ends if piece[at:n] in known), at + 1)
            if end > at + 1:
                inherited[piece[at:end]] += uses[piece]
            at, tokens = end, tokens + 1
        saved[piece] = min(alone[piece], tokens - 1)
    return saved, inherited
