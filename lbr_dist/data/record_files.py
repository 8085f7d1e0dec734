"""Read records from JSON lines, Parquet and Arrow files, and folders of them. Each record has a place for messages.

`records` reads whole files. `spans` cuts a file into parts, so that several processes can share it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lbr_dist.errors import DataError

RawRecord = dict[str, Any]

_LINES = (".jsonl", ".json")
_READ_ROWS = 1000
_SPLITS = ("train", "validation", "valid", "dev", "test")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is, for messages: ``pairs.jsonl:12``, or ``pairs.parquet: row 12``."""

    file: Path
    number: int
    start: int = 0
    """The byte from which `number` counts lines, if a file is read in parts. Messages count from the file's start."""

    def __str__(self) -> str:
        if self.file.suffix in _LINES:
            return f"{self.file}:{self.number + _lines_before(self.file, self.start)}"
        return f"{self.file}: row {self.number}"

    def error(self, found: str, expected: str, remedy: str) -> DataError:
        return DataError(f"{self}: found {found}, expected {expected}. {remedy}")


def records(path: Path) -> Iterator[tuple[Place, RawRecord]]:
    """Every record of a file or folder with its place, counted from 1 in each file."""
    for file in record_files(path):
        for place, row in span_rows(Span(file, 0, sys.maxsize)):
            assert row is not None  # no line is too long here
            yield place, row


def record_files(path: Path) -> list[Path]:
    """The files of a corpus or of pairs, in reading order.

    Raises:
        DataError: no such file, an empty file, an unknown kind of file, or a folder with several splits.
    """
    if path.is_dir():
        return _folder_files(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file or folder. Check the path and, if it is relative, the working directory."
        )
    if path.suffix not in (".jsonl", ".json", ".parquet", ".arrow"):
        raise DataError(
            f"{path}: found a file ending in {path.suffix!r}, expected .jsonl, .json (one object a line), .parquet, "
            ".arrow or a folder. Convert it, or rename it if it is one of these."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: found an empty file, expected at least one record. Was a copy interrupted?")
    return [path]


def _folder_files(folder: Path) -> list[Path]:
    """The files of one split, in a dataset saved by Hugging Face datasets or in a plain folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
        raise DataError(
            f"{folder}: found a dataset with the splits {', '.join(splits)}, expected one split. "
            f"Name the folder of one split, such as {folder / (splits[0] if splits else 'train')}."
        )
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / each["filename"] for each in state["_data_files"]]
    files = [file for pattern in ("*.jsonl", "*.parquet", "*.arrow") for file in sorted(folder.glob(pattern))]
    if not files:
        raise DataError(f"{folder}: found no .jsonl, .parquet or .arrow file in this folder, expected at least one.")
    splits = sorted({name for file in files for name in _SPLITS if re.match(rf"{name}\b", file.name)})
    if len(splits) > 1:
        raise DataError(
            f"{folder}: found files of the splits {', '.join(splits)}, expected files of one split. "
            "Name one file, or move each split to its own folder."
        )
    return [each for file in files for each in record_files(file)]


# ---- parts of files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file: the lines that begin in a range of bytes, or a range of row groups or record batches."""

    file: Path
    first: int
    """First byte, row group or record batch."""

    last: int
    """Exclusive end of the range."""

    weight: int = 0
    """Approximate bytes of the records."""

    rows_before: int = 0
    """Rows of a table before this part. Lines of a text file are counted only when a message needs them."""


def spans(file: Path, weight: int) -> Iterator[Span]:
    """Cut a file into parts of at least `weight` bytes, in file order. Row groups and record batches stay whole.

    Raises:
        DataError: a table cannot be read.
    """
    if file.suffix in _LINES:
        size = file.stat().st_size
        for first in range(0, size, weight):
            yield Span(file, first, min(size, first + weight), min(weight, size - first))
        return
    first = last = rows_before = rows = held = 0
    for count, size in _table_groups(file):
        last, rows, held = last + 1, rows + count, held + size
        if held >= weight:
            yield Span(file, first, last, held, rows_before)
            first, rows_before, held = last, rows, 0
    if last > first:
        yield Span(file, first, last, held, rows_before)


def span_rows(
    span: Span, columns: tuple[str, ...] = (), longest_line: int = -1
) -> Iterator[tuple[Place, RawRecord | None]]:
    """The records of a part with their places. Holds one line in memory, or 1,000 rows and what decodes them.

    Args:
        span: the part.
        columns: the columns to read if a table has the first of them; otherwise all columns are read.
        longest_line: maximum bytes of a JSON line; a longer line gives None instead of a record.

    Raises:
        DataError: a line is not a JSON object, or a table cannot be read.
    """
    if span.file.suffix in _LINES:
        yield from _span_lines(span, longest_line)
    else:
        yield from _span_table(span, columns)


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def _span_lines(span: Span, longest: int) -> Iterator[tuple[Place, RawRecord | None]]:
    with span.file.open("rb") as lines:
        if span.first:
            lines.seek(span.first - 1)
            _skip_line(lines)
        start = at = lines.tell()
        number = 0
        while at < span.last and (line := lines.readline(longest)):
            number += 1
            place = Place(span.file, number, start)
            if len(line) == longest and not line.endswith(b"\n"):
                _skip_line(lines)
                yield place, None
            elif line.strip():
                yield place, _json_row(place, line)
            at = lines.tell()


def _skip_line(lines: IO[bytes]) -> None:
    while (part := lines.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _json_row(place: Place, line: bytes) -> RawRecord:
    begins_file = place.number == 1 and not place.start
    try:
        row = json.loads(line.decode("utf-8-sig" if begins_file else "utf-8"))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
        raise place.error(
            f"a line that is not JSON ({reason}): {line[:60]!r}",
            "one JSON object a line",
            "Fix or remove this line.",
        ) from error
    if not isinstance(row, dict):
        raise place.error(
            f"a JSON {type(row).__name__}",
            "one JSON object a line",
            "Write each record as an object on its own line.",
        )
    return row


def _lines_before(file: Path, end: int) -> int:
    count = 0
    with file.open("rb") as content:
        while end > 0 and (block := content.read(min(end, 1 << 20))):
            count += block.count(b"\n")
            end -= len(block)
    return count


# ---- Parquet and Arrow ----------------------------------------------------------------------------------------------


def _span_table(span: Span, columns: tuple[str, ...]) -> Iterator[tuple[Place, RawRecord]]:
    import pyarrow.parquet as pq

    def present(names: list[str]) -> list[str]:
        return [name for name in columns if name in names] if set(columns[:1]) & set(names) else names

    place = _LastPlace(span.file, span.rows_before)
    with _whole_table(place):
        if span.file.suffix == ".parquet":
            # without these two, pyarrow reads whole row groups ahead and decodes in its own threads
            with pq.ParquetFile(span.file, memory_map=True, pre_buffer=False) as table:
                groups = range(span.first, min(span.last, table.metadata.num_row_groups))
                chosen = present(table.schema_arrow.names)
                for batch in table.iter_batches(_READ_ROWS, groups, chosen, use_threads=False):
                    for row in batch.to_pylist():
                        yield place.next(), row
        else:
            with _arrow_stream(span.file) as (stream, _):
                chosen = present(stream.schema.names)
                for number, batch in enumerate(stream):
                    if number >= span.last:
                        break
                    if number < span.first:
                        continue
                    for first in range(0, batch.num_rows, _READ_ROWS):
                        for row in batch.slice(first, _READ_ROWS).select(chosen).to_pylist():
                            yield place.next(), row


def _table_groups(file: Path) -> Iterator[tuple[int, int]]:
    """Rows and bytes of each row group or record batch."""
    import pyarrow.parquet as pq

    place = _LastPlace(file)
    with _whole_table(place):
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                for group in map(table.metadata.row_group, range(table.metadata.num_row_groups)):
                    yield group.num_rows, group.total_byte_size
        else:
            with _arrow_stream(file) as (stream, mapped):
                before = mapped.tell()
                for batch in stream:
                    place.number += batch.num_rows
                    yield batch.num_rows, mapped.tell() - before
                    before = mapped.tell()


class _LastPlace:
    """Counts the rows of a table, so that an error can name the row."""

    def __init__(self, file: Path, before: int = 0) -> None:
        self.file, self.number = file, before

    def next(self) -> Place:
        self.number += 1
        return Place(self.file, self.number)


@contextmanager
def _whole_table(place: _LastPlace) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{place.file}: row {place.number + 1}: found data that cannot be read as {place.file.suffix[1:]} "
            f"({error}), expected a complete file. Write or copy it again."
        ) from error


@contextmanager
def _arrow_stream(file: Path) -> Iterator[tuple[Any, Any]]:
    """The record batches of an Arrow stream, and the mapped file, whose position shows how much has been read."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        yield stream, mapped
