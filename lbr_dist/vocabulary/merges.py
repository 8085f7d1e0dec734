"""A BPE tokenizer with more tokens: the content of its tokenizer.json, and new merges that continue its own.

Continued BPE training as in Purason et al., *Teaching Old Tokenizers New Words* (arXiv:2512.03989). The new merges come
last, so the base tokenizer's own segmentation is always found first.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from lbr_dist.errors import ModelError

Content = dict[str, Any]
"""The content of a tokenizer.json."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A new token: its name in the tokenizer, the base tokens it replaces, and how many tokens it saved when chosen."""

    token: str
    base_ids: tuple[int, ...]
    saved: int
    merge: tuple[str, str] | None
    """The two tokens that it is glued from; None for a matched piece."""


def bpe_content(base: Path, tokenizer: Tokenizer) -> Content:
    """The content of the tokenizer as transformers runs it, without padding and truncation.

    Raises:
        ModelError: it is not BPE, or its tokens, joined, are not the text.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content: Content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"{base}/tokenizer.json: model.type is {model['type']}, expected BPE. New pieces are added as BPE merges. "
            "Use a base model with a BPE tokenizer, such as Llama 3, Qwen, Mistral, Gemma or SmolLM."
        )
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model[field]:
            raise ModelError(
                f"{base}/tokenizer.json: model.{field} is {model[field]!r}, expected none. With it, a piece is not "
                "its tokens joined together. Use another base model."
            )
    return content


def extended(content: Content, entries: Sequence[Entry]) -> Content:
    """The tokenizer with the entries, numbered after its last token."""
    # on loading, an added token that the BPE model does not have gets a new id, after the model's last one
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab |= {entry.token: i for i, entry in enumerate(entries, 1 + max(vocab.values()))}
    flags = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
    added = [{"id": vocab[entry.token], "content": entry.token} | flags for entry in entries if not entry.merge]
    merges = [list(entry.merge) for entry in entries if entry.merge]
    model = content["model"] | {"vocab": vocab, "merges": content["model"]["merges"] + merges}
    return content | {"added_tokens": content["added_tokens"] + added, "model": model}


def tokenizer_of(content: Content, entries: Sequence[Entry] = ()) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(extended(content, entries)))


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoding]:
    for start in range(0, len(texts), 1000):  # encodings take a hundred times the memory of their texts
        yield from tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)


def restores(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bool]:
    """For each text, whether its tokens decode to exactly the same text."""
    decoded = (tokenizer.decode(each.ids, skip_special_tokens=False) for each in encoded(tokenizer, texts))
    return [one == other for one, other in zip(decoded, texts, strict=True)]


# ---- more merges --------------------------------------------------------------------------------------------------


def glued(content: Content, matched: Sequence[Entry], texts: Sequence[str], limit: int, min_count: int) -> list[Entry]:
    """Pieces within the words of the base tokenizer, in the order that their merges must have."""
    tokenizer = tokenizer_of(content, matched)
    apart = {token["content"] for token in content["added_tokens"]} | {entry.token for entry in matched}
    apart.add(content["model"]["unk_token"])
    if content["model"]["byte_fallback"]:
        apart |= {f"<0x{i:02X}>" for i in range(256)}
    words: Counter[tuple[str, ...]] = Counter()
    for encoding in encoded(tokenizer, texts):
        word: list[str] = []
        last: int | None = None
        for token, number in zip(encoding.tokens, encoding.word_ids, strict=True):
            # tokenizers like sentencepiece's don't split text into words, but mark where they start
            if number != last or token in apart or token.startswith("▁"):
                words[tuple(word)] += 1
                word = []
            last = number
            if token not in apart:
                word.append(token)
        words[tuple(word)] += 1
    return learn_merges(words, tokenizer.get_vocab(), limit, min_count)


def learn_merges(
    words: Mapping[tuple[str, ...], int], ids: Mapping[str, int], limit: int, min_count: int
) -> list[Entry]:
    """Joins the most frequent pair of neighbours in the counted words, again and again.

    A pair that gives an existing token is skipped: its merge would change text without new pieces.
    """
    spelled, counts = list(words), list(words.values())
    totals: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, word in enumerate(spelled):
        for pair in pairwise(word):
            totals[pair] += counts[number]
            where[pair].add(number)
    queue = [(-total, pair) for pair, total in totals.items() if total >= min_count]
    heapq.heapify(queue)
    parts: dict[str, tuple[int, ...]] = {name: (i,) for name, i in ids.items()}
    entries: list[Entry] = []
    while queue and len(entries) < limit:
        bound, pair = heapq.heappop(queue)
        name = pair[0] + pair[1]
        if totals[pair] < min_count or name in parts:
            continue
        if totals[pair] != -bound:  # out of date: the total of an existing pair can only fall
            heapq.heappush(queue, (-totals[pair], pair))
            continue
        joined = {number: _joined(spelled[number], pair) for number in where.pop(pair)}
        saved = sum((len(spelled[number]) - len(word)) * counts[number] for number, word in joined.items())
        if saved < min_count:  # in `a a a`, the pair occurs twice but is joined once
            continue
        fresh = set()
        for number, word in joined.items():
            for old in pairwise(spelled[number]):
                totals[old] -= counts[number]
            for new in pairwise(word):
                totals[new] += counts[number]
                if name in new:
                    where[new].add(number)
                    fresh.add(new)
            spelled[number] = word
        for new in fresh:
            heapq.heappush(queue, (-totals[new], new))
        parts[name] = parts[pair[0]] + parts[pair[1]]
        entries.append(Entry(name, parts[name], saved, pair))
    return entries


def _joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    tokens: list[str] = []
    at = 0
    while at < len(word):
        found = word[at : at + 2] == pair
        tokens.append("".join(pair) if found else word[at])
        at += 2 if found else 1
    return tuple(tokens)
