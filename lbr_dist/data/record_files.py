"""Read records from JSON lines, CSV, Parquet, Arrow and text files, and folders of them. Each has a place for messages.

`records` reads whole files. `spans` cuts a file into parts, so that several processes can share it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lbr_dist.data.place import LINES, TABLES, TEXTS, Place, RawRecord, Span, is_readable, kind, packing
from lbr_dist.data.tables import table_groups, table_rows
from lbr_dist.data.text_files import cell_rows, json_rows, text_rows
from lbr_dist.errors import DataError
from lbr_dist.storage.fingerprint import visible_files

Columns = Mapping[str, str]
"""`data.columns`: our names of fields to the names of the columns that are read as them."""

_SPLITS = ("train", "validation", "valid", "dev", "test")
_NOT_ALONE = (*TEXTS, ".json")
"""Endings of files that are often something else in a folder of records: its page, its settings."""

_UNPACKED = 4
"""Bytes of JSON lines in a byte of a compressed file, roughly."""

_ENDINGS = ".jsonl, .json (one object a line), .csv, .tsv, each of these also as .gz or .zst, .parquet, .arrow"


def records(path: Path, columns: Columns | None = None) -> Iterator[tuple[Place, RawRecord]]:
    """Every record of a file or folder with its place, counted from 1 in each file."""
    for file in record_files(path):
        for place, row in span_rows(Span(file, 0, sys.maxsize), columns=columns):
            assert row is not None  # no line is too long here
            yield place, row


def root_of(path: Path) -> Path:
    """The folder from which on the files of a path are named."""
    return path if path.is_dir() else path.parent


def also_read_as(files: Iterable[Path], columns: Columns | None = None) -> list[str]:
    """What the records of these files depend on besides their bytes.

    Nothing for JSON lines, Parquet and Arrow: their bytes say what they are.
    """
    kinds = sorted({f"{kind(file)}{packing(file)}" for file in files} - {*LINES, *TABLES})
    return [*kinds, *(f"{ours}={theirs}" for ours, theirs in sorted((columns or {}).items()))]


# ---- which files --------------------------------------------------------------------------------------------------


def record_files(path: Path) -> list[Path]:
    """The files of a corpus or of pairs, in reading order.

    Raises:
        DataError: no such file, an empty file, an unknown kind of file, or a folder with several splits.
    """
    if path.is_dir():
        return _folder_files(path)
    if not path.is_file():
        split = _split_files(path)
        if split:
            return split
        raise DataError(
            f"{path}: no such file or folder. Check the path and, if it is relative, the working directory."
        )
    if not is_readable(path):
        raise DataError(
            f"{path}: found a file ending in {path.suffix!r}, expected {_ENDINGS}, or a folder. Convert it, unpack it, "
            "or rename it if it is one of these."
        )
    if kind(path) in TEXTS:
        raise DataError(
            f"{path}: found one text file, expected a folder of them (each is a document), or one of {_ENDINGS}. "
            'Name its folder, or write a line {"text": ...} of a .jsonl file for each document in it.'
        )
    _check_not_empty(path)
    return [path]


def _check_not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: found an empty file, expected at least one record. Was a copy interrupted?")


def _folder_files(folder: Path) -> list[Path]:
    """The files of one split, in a dataset saved by Hugging Face datasets, a copy of the Hub's, or a plain folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
        raise DataError(
            f"{folder}: found a dataset with the splits {', '.join(splits)}, expected one split. "
            f"Name the folder of one split, such as {folder / (splits[0] if splits else 'train')}."
        )
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / each["filename"] for each in state["_data_files"]]
    files = _record_files_in(folder)
    splits = sorted({split for file in files if (split := _split_of(file))})
    if len(splits) > 1:
        inside = f" such as {folder / splits[0]}," if not (folder / splits[0]).exists() else ""
        raise DataError(
            f"{folder}: found files of the splits {', '.join(splits)}, expected files of one split. "
            f"Name one split,{inside} or one file."
        )
    for file in files:
        _check_not_empty(file)
    return files or _texts_in(folder)


def _record_files_in(folder: Path) -> list[Path]:
    """The files of records in a folder, or in its folder `data`, as data sets of the Hub have it."""
    files = [file for pattern in ("*.jsonl", "*.parquet", "*.arrow") for file in sorted(folder.glob(pattern))]
    if files:
        return files
    others = sorted(each for each in folder.iterdir() if each.is_file() and is_readable(each))
    others = [file for file in others if file.suffix not in _NOT_ALONE]
    kinds = sorted({f"{kind(file)}{packing(file)}" for file in others})
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: found files of the kinds {', '.join(kinds)}, expected one kind. Name one file, or move each "
            "kind to its own folder."
        )
    if not others and (folder / "data").is_dir():
        return _record_files_in(folder / "data")
    return others


def _split_of(file: Path) -> str:
    """The split that a file's name begins with, or nothing."""
    return next((name for name in _SPLITS if re.match(rf"{name}\b", file.name)), "")


def _split_files(path: Path) -> list[Path]:
    """The files of one split, if the path is that of a folder and the split's name."""
    if path.name not in _SPLITS or not path.parent.is_dir():
        return []
    files = [file for file in _record_files_in(path.parent) if _split_of(file) == path.name]
    for file in files:
        _check_not_empty(file)
    return files


def _texts_in(folder: Path) -> list[Path]:
    """The plain texts of a folder and of those in it. Files of records among them are not left out in silence."""
    inside = visible_files(folder)
    others = [file for file in inside if is_readable(file) and file.suffix not in _NOT_ALONE]
    if others:
        raise DataError(
            f"{folder}: found files of records only further down, such as {others[0]}. Name the folder that they are "
            f"in: {others[0].parent}."
        )
    texts = [file for file in inside if file.suffix in TEXTS]
    if not texts:
        raise DataError(
            f"{folder}: found no .jsonl, .parquet, .arrow, .csv or .tsv file in this folder, and no .txt or .md, "
            "expected at least one."
        )
    return texts


# ---- parts of files -----------------------------------------------------------------------------------------------


def spans(file: Path, weight: int) -> Iterator[Span]:
    """Cut a file into parts of at least `weight` bytes, in file order. Row groups and record batches stay whole.

    Raises:
        DataError: a table cannot be read.
    """
    if kind(file) not in TABLES:
        size = file.stat().st_size
        if packing(file) or kind(file) not in LINES:
            yield Span(file, 0, sys.maxsize, size * (_UNPACKED if packing(file) else 1))
            return
        for first in range(0, size, weight):
            yield Span(file, first, min(size, first + weight), min(weight, size - first))
        return
    first = last = rows_before = rows = held = 0
    for count, size in table_groups(file):
        last, rows, held = last + 1, rows + count, held + size
        if held >= weight:
            yield Span(file, first, last, held, rows_before)
            first, rows_before, held = last, rows, 0
    if last > first:
        yield Span(file, first, last, held, rows_before)


def span_rows(
    span: Span, fields: tuple[str, ...] = (), longest_line: int = -1, columns: Columns | None = None
) -> Iterator[tuple[Place, RawRecord | None]]:
    """The records of a part with their places. Holds one line or text in memory, or 1,000 rows and what decodes them.

    Args:
        span: the part.
        fields: the fields to read if a table has the first of them; otherwise all columns are read.
        longest_line: maximum bytes of a JSON line or a text file; a longer one gives None instead of a record.
        columns: names of fields that differ in the file. A record without such a column is read as it is.

    Raises:
        DataError: a line is not a JSON object, or a file cannot be read.
    """
    columns = columns or {}
    found = kind(span.file)
    rows: Iterator[tuple[Place, RawRecord | None]]
    if found in TABLES:
        rows = table_rows(span, tuple(dict.fromkeys([*(columns.get(name, name) for name in fields), *fields])))
    elif found in TEXTS:
        rows = text_rows(span, longest_line)
    else:
        rows = json_rows(span, longest_line) if found in LINES else cell_rows(span)
    for place, row in rows:
        yield place, _renamed(row, columns) if columns and row else row


def _renamed(row: RawRecord, columns: Columns) -> RawRecord:
    """The record with the mapped columns under our names, in place of any that had these names."""
    present = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    taken = set(present.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in present.items()}
