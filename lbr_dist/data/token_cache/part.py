"""Tokenise one part of a corpus into one pair of files: the work of a single process in a build.

    part-00003.tokens     token ids of the documents, one after another, uint16 or uint32
    part-00003.lengths    tokens of each document, uint32
    done/00003.json       counts and checksums of the part, written last: a part without it is not finished

A part is the same whichever rank or process writes it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lbr_dist.data.fields import titled_text
from lbr_dist.data.place import Place, Span
from lbr_dist.data.record_files import span_rows, spans
from lbr_dist.storage.files import sync, write_atomic

DONE = "done"
TOKENIZER_FILE = "tokenizer.json"
LENGTH = "<u4"

_BATCH_TEXTS = 1000
_BATCH_CHARACTERS = 1 << 20
_MOST_NOISE = 0.1
_NOISE = re.compile("[\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
_SURROGATE = re.compile("[\ud800-\udfff]")

EMPTY, ENORMOUS, BINARY, BROKEN = "empty", "enormous", "binary", "broken Unicode"


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a part depends on besides its documents and the tokenizer."""

    dtype: str
    """Dtype of the tokens: `<u2` or `<u4`."""

    max_characters: int
    """Longer texts are left out."""

    split_special_tokens: bool
    """Whether the text of a special token is read as plain text."""

    columns: tuple[tuple[str, str], ...] = ()
    """`data.columns`: our names of fields, and the columns that are read as them."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The spans that make up one part."""

    number: int
    spans: tuple[Span, ...]

    @property
    def weight(self) -> int:
        return sum(span.weight for span in self.spans)


@dataclass(slots=True)
class Part:
    """A tokenised unit: counts, checksums, and what was left out."""

    number: int
    documents: int = 0
    tokens: int = 0
    tokens_crc: int = 0
    lengths_crc: int = 0
    skipped: dict[str, tuple[int, Place]] = field(default_factory=dict)
    """Reason to the number of documents left out, and the place of the first one."""

    def to_json(self) -> str:
        skipped = {name: (n, str(at.file), at.number, at.start) for name, (n, at) in self.skipped.items()}
        return json.dumps(asdict(self) | {"skipped": skipped})

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Raises ValueError, TypeError, KeyError or AttributeError if `to_json` did not write the text."""
        values = json.loads(text)
        skipped = {name: (n, Place(Path(at[0]), *at[1:])) for name, (n, *at) in values.pop("skipped").items()}
        return cls(**values, skipped=skipped)


def part_file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"part-{number:05d}.{kind}"


def units(files: Iterable[Path], weight: int) -> Iterator[Unit]:
    """Divide a corpus into units of at least `weight` bytes; small files and record batches are combined.

    Raises:
        DataError: a table cannot be read.
    """
    number, held = 0, 0
    chosen: list[Span] = []
    for span in chain.from_iterable(spans(file, weight) for file in files):
        chosen.append(span)
        held += span.weight
        if held >= weight:
            yield Unit(number, tuple(chosen))
            number, held, chosen = number + 1, 0, []
    if chosen:
        yield Unit(number, tuple(chosen))


def write_part(unit: Unit, tokenizer: Path, folder: Path, rules: TokenRules) -> Part:
    """Tokenise a unit into its two files in `folder`, flushed to disk.

    Holds one batch at a time in memory: up to 1,000 texts and a million characters, or one longer text.

    Args:
        unit: what to read.
        tokenizer: a `tokenizer.json`.
        folder: where the files go; the record of the finished part goes to its `DONE` folder.
        rules: see `TokenRules`.

    Raises:
        DataError: a record cannot be used; names its file and line.
        OSError: the files cannot be written.
    """
    part = Part(unit.number)
    final = [part_file(folder, unit.number, kind) for kind in ("tokens", "lengths")]
    # a new name for each attempt: a process of an earlier attempt may still be running
    attempt = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in final]
    with attempt[0].open("xb") as tokens, attempt[1].open("xb") as lengths:
        for batch in _batches(_texts(unit, rules, part)):
            ids = _encode(batch, tokenizer, rules.split_special_tokens)
            counts = np.fromiter(map(len, ids), LENGTH, len(ids))
            content = np.fromiter(chain.from_iterable(ids), rules.dtype, int(counts.sum())).tobytes()
            tokens.write(content)
            lengths.write(counts.tobytes())
            part.tokens_crc = zlib.crc32(content, part.tokens_crc)
            part.lengths_crc = zlib.crc32(counts.tobytes(), part.lengths_crc)
            part.documents += len(ids)
            part.tokens += int(counts.sum())
        for file in (tokens, lengths):
            file.flush()
            os.fsync(file.fileno())
    for temporary, path in zip(attempt, final, strict=True):
        temporary.replace(path)
    sync(folder)
    (folder / DONE).mkdir(exist_ok=True)
    write_atomic(folder / DONE / f"{unit.number:05d}.json", part.to_json())
    return part


def _texts(unit: Unit, rules: TokenRules, part: Part) -> Iterator[str]:
    # a character takes at most six bytes in JSON (an escape), and four in UTF-8
    longest_line = 6 * rules.max_characters + (1 << 16)
    for span in unit.spans:
        for place, row in span_rows(span, ("text", "title"), longest_line, dict(rules.columns)):
            if row is None:
                defect = ENORMOUS
            elif isinstance(row.get("text"), str) and not row["text"].strip():
                defect = EMPTY
            else:
                text = titled_text(place, row).strip()
                defect = _defect(text, rules.max_characters)
            if not defect:
                yield text
                continue
            count, first = part.skipped.get(defect, (0, place))
            part.skipped[defect] = (count + 1, first)


def _defect(text: str, max_characters: int) -> str:
    """Why a text is left out; empty if it is kept."""
    if len(text) > max_characters:
        return ENORMOUS
    if "\0" in text or len(_NOISE.findall(text)) > _MOST_NOISE * len(text):
        return BINARY
    return BROKEN if _SURROGATE.search(text) else ""


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        if batch and (len(batch) == _BATCH_TEXTS or held + len(text) > _BATCH_CHARACTERS):
            yield batch
            batch, held = [], 0
        batch.append(text)
        held += len(text)
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Path, split_special_tokens: bool) -> list[list[int]]:
    """Same as `TextTokenizer.encode`, but without transformers: importing it costs each process seconds and 200 MB."""
    backend = _load(tokenizer)
    backend.encode_special_tokens = split_special_tokens
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


@lru_cache(maxsize=1)
def _load(tokenizer: Path) -> Tokenizer:
    backend = Tokenizer.from_file(str(tokenizer))
    backend.no_padding()
    backend.no_truncation()
    return backend
