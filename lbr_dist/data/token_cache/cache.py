"""A tokenised corpus on disk, read through memory maps: documents, and the pieces that stage 1 learns from.

`build.py` writes it. A cache folder is complete or absent:

    KEY/manifest.json      what is in it, with sizes and checksums
    KEY/part-00000.*       see part.py
    KEY/tokenizer.json     the tokenizer that made the tokens
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from lbr_dist.config import RunConfig
from lbr_dist.data import sampler
from lbr_dist.data.token_cache.part import LENGTH, part_file
from lbr_dist.errors import DataError

SCHEMA = 1
MANIFEST = "manifest.json"

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Counts of a tokenised corpus."""

    documents: int
    tokens: int
    skipped: dict[str, tuple[int, str]]
    """Reason to the number of documents left out, and the place of the first one."""

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.tokens:,} tokens"
        reasons = [f"{count:,} {reason} (the first: {first})" for reason, (count, first) in self.skipped.items()]
        return text + (f"; left out: {', '.join(reasons)}" if reasons else "; none left out")


class Documents(Protocol):
    """Documents that can be cut into pieces."""

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """``[documents]``: tokens of each."""
        ...

    def span(self, document: int, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of a document."""
        ...


class _Items(Sequence[Tokens]):
    """A sequence whose items come from `_item`, and its length from `__len__`."""

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | Sequence[Tokens]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return self._item(index % len(self))

    def __iter__(self) -> Iterator[Tokens]:
        return (self._item(i) for i in range(len(self)))

    def _item(self, index: int) -> Tokens:
        raise NotImplementedError


class TokenCache(_Items):
    """The documents of a cache folder, by number, in the order of the corpus.

    Takes 8 bytes of memory per document; the tokens stay in the file cache.

    Raises:
        DataError: the folder is damaged. Only sizes are compared; `verify` reads everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = self._read_manifest()
        self.report = CorpusReport(
            manifest["documents"],
            manifest["tokens"],
            {reason: (count, first) for reason, (count, first) in manifest["skipped"].items()},
        )
        self._parts: list[dict[str, int]] = manifest["parts"]
        self._tokens = [self._map(part, "tokens", manifest["dtype"]) for part in self._parts]
        self._lengths = [self._map(part, "lengths", LENGTH) for part in self._parts]
        self._first_documents = _ends([part["documents"] for part in self._parts])
        self._first_tokens = _ends([part["tokens"] for part in self._parts])
        self._offsets = np.zeros(self.report.documents + 1, np.int64)
        if self._lengths:
            np.cumsum(np.concatenate(self._lengths), dtype=np.int64, out=self._offsets[1:])
        if self._offsets[self._first_documents].tolist() != self._first_tokens.tolist():
            raise self._damaged(folder, "lengths that do not add up to the tokens")

    def __len__(self) -> int:
        return self.report.documents

    @property
    def num_tokens(self) -> int:
        return self.report.tokens

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """``[documents]``: tokens of each; a new array."""
        return np.concatenate([np.zeros(0, LENGTH), *self._lengths])

    def span(self, document: int, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of a document; both must be within it."""
        part = int(self._first_documents.searchsorted(document, side="right")) - 1
        before = int(self._offsets[document] - self._first_tokens[part])
        return tuple(self._tokens[part][before + start : before + stop].tolist())

    def _item(self, index: int) -> Tokens:
        return self.span(index, 0, int(self._offsets[index + 1] - self._offsets[index]))

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises DataError for the first one that differs."""
        for part in self._parts:
            for kind in ("tokens", "lengths"):
                path = part_file(self.folder, part["number"], kind)
                checksum = 0
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        checksum = zlib.crc32(block, checksum)
                if checksum != part[f"{kind}_crc"]:
                    raise self._damaged(path, f"checksum {checksum:08x}, expected {part[f'{kind}_crc']:08x}")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA:
                raise self._damaged(path, f"schema {manifest['schema']}, expected {SCHEMA}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, f"no manifest that can be read ({error!r})") from None
        return manifest

    def _map(self, part: dict[str, int], kind: str, dtype: str) -> NDArray[Any]:
        path = part_file(self.folder, part["number"], kind)
        items = part["tokens" if kind == "tokens" else "documents"]
        expected = items * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.exists() else None
        if found != expected:
            raise self._damaged(path, f"{'no file' if found is None else f'{found} bytes'}, expected {expected} bytes")
        # an empty file cannot be mapped; and slicing the subclass memmap is ten times slower
        return np.asarray(np.memmap(path, dtype, "r")) if items else np.zeros(0, dtype)

    def _damaged(self, path: Path, found: str) -> DataError:
        return DataError(f"{path}: found {found}: the token cache is damaged. Delete {self.folder} to make it again.")


class Pieces(_Items):
    """Every document cut into pieces of at most `longest` tokens; pieces shorter than `shortest` are left out.

    Takes 12 bytes of memory per document.
    """

    def __init__(self, documents: Documents, longest: int, shortest: int = 2) -> None:
        if longest < 1 or shortest < 1:
            raise ValueError(f"pieces of {shortest} to {longest} tokens: both must be 1 or more")
        self.documents, self.longest, self.shortest = documents, longest, shortest
        self._lengths = documents.lengths
        full, rest = np.divmod(self._lengths, np.uint32(longest))
        counts = full * np.uint32(longest >= shortest) + (rest >= shortest)
        self._first = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, dtype=np.int64, out=self._first[1:])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_too_short(self) -> int:
        """Number of documents that are not empty but too short to give a piece."""
        return int(((self._lengths > 0) & (np.diff(self._first) == 0)).sum())

    def _item(self, index: int) -> Tokens:
        document = int(self._first.searchsorted(index, side="right")) - 1
        start = (index - int(self._first[document])) * self.longest
        return self.documents.span(document, start, min(start + self.longest, int(self._lengths[document])))


def _ends(counts: list[int]) -> NDArray[np.int64]:
    """0, followed by the running sums."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


class _Without:
    """Documents, some of them with their length set to 0."""

    def __init__(self, documents: Documents, left_out: NDArray[np.int64]) -> None:
        self._documents = documents
        self.lengths = documents.lengths.copy()
        self.lengths[left_out] = 0

    def span(self, document: int, start: int, stop: int) -> Tokens:
        return self._documents.span(document, start, stop)


def split(documents: Documents, longest: int, held_out: int) -> tuple[Pieces, list[Tokens]]:
    """Training texts, and held-out texts from other documents.

    Args:
        documents: the tokenised corpus.
        longest: documents are cut into pieces of at most this many tokens.
        held_out: how many documents to hold out, at most a twentieth of all; each gives its first piece.
    """
    count = min(held_out, len(documents.lengths) // 20)
    if not count:
        return Pieces(documents, longest), []
    left_out = sampler.shuffled(np.arange(count, dtype=np.uint64), len(documents.lengths), 0, 0).astype(np.int64)
    texts = [documents.span(int(d), 0, min(longest, int(documents.lengths[d]))) for d in left_out]
    return Pieces(_Without(documents, left_out), longest), [text for text in texts if len(text) > 1]


def learn_texts(cache: TokenCache, config: RunConfig) -> tuple[Pieces, list[Tokens]]:
    """The texts that stage 1 trains on, and the held-out texts for its diagnostics.

    Raises:
        DataError: there are fewer texts than a batch needs.
    """
    learn = config.learn
    texts, held_out = split(cache, learn.max_text_tokens, learn.held_out_texts if learn.diagnose_every else 0)
    if len(texts) < learn.batch_texts:
        raise DataError(
            f"{config.data.learn_corpus or config.data.corpus}: found {len(texts)} texts of two tokens or more to "
            f"train on ({cache.report}; {len(held_out)} held out), learn.batch_texts is {learn.batch_texts}. Lower "
            "learn.batch_texts, or add more text."
        )
    return texts, held_out
