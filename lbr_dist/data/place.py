"""What a data file is by its name, a part of it, and the place of a record in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_dist.errors import DataError

RawRecord = dict[str, Any]

LINES = (".jsonl", ".json")
CELLS = (".csv", ".tsv")
TABLES = (".parquet", ".arrow")
TEXTS = (".txt", ".md")
PACKED = (".gz", ".zst")


def packing(file: Path) -> str:
    """`.gz` or `.zst` if the file is compressed, else nothing."""
    return file.suffix if file.suffix in PACKED else ""


def kind(file: Path) -> str:
    """The ending that says what is in a file: `.jsonl` for `corpus.jsonl.gz`."""
    return Path(file.name.removesuffix(packing(file))).suffix


def is_readable(file: Path) -> bool:
    """Whether a file's name is one that we read, alone or in a folder."""
    return kind(file) in (LINES + CELLS if packing(file) else LINES + CELLS + TABLES + TEXTS)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is, for messages: ``pairs.jsonl:12``, or ``pairs.parquet: row 12``, or ``notes/a.txt``."""

    file: Path
    number: int
    start: int = 0
    """The byte from which `number` counts lines, if a file is read in parts. Messages count from the file's start."""

    def __str__(self) -> str:
        found = kind(self.file)
        if found in LINES + CELLS:
            return f"{self.file}:{self.number + _lines_before(self.file, self.start)}"
        return str(self.file) if found in TEXTS else f"{self.file}: row {self.number}"

    @property
    def stem(self) -> str:
        """The file's name without its endings."""
        return Path(self.file.name.removesuffix(packing(self.file))).stem

    def identifier(self, root: Path) -> str:
        """The id of a document that has none: its file, from `root` on, and its line or row."""
        name = self.file.relative_to(root).as_posix()
        return name if kind(self.file) in TEXTS else f"{name}:{self.number}"

    def error(self, found: str, expected: str, remedy: str) -> DataError:
        return DataError(f"{self}: found {found}, expected {expected}. {remedy}")


def _lines_before(file: Path, end: int) -> int:
    count = 0
    with file.open("rb") as content:
        while end > 0 and (block := content.read(min(end, 1 << 20))):
            count += block.count(b"\n")
            end -= len(block)
    return count


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file: the lines that begin in a range of bytes, or a range of row groups or record batches.

    A compressed file, a CSV file and a text cannot be cut: one part has all of it.
    """

    file: Path
    first: int
    """First byte, row group or record batch."""

    last: int
    """Exclusive end of the range."""

    weight: int = 0
    """Approximate bytes of the records."""

    rows_before: int = 0
    """Rows of a table before this part. Lines of a text file are counted only when a message needs them."""
