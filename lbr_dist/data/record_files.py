"""Records from files: JSON lines, Parquet, Arrow, and folders of them, each record with its place for messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_dist.errors import DataError

Row = dict[str, Any]

_SPLITS = ("train", "validation", "valid", "dev", "test")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands, for messages: ``pairs.jsonl:12``, or ``pairs.parquet: row 12``."""

    file: Path
    number: int

    def __str__(self) -> str:
        lines = self.file.suffix in (".jsonl", ".json")
        return f"{self.file}:{self.number}" if lines else f"{self.file}: row {self.number}"

    def error(self, found: str, expected: str, remedy: str) -> DataError:
        return DataError(f"{self}: found {found}, expected {expected}. {remedy}")


def records(path: Path) -> Iterator[tuple[Place, Row]]:
    """Every record of a file or folder with its place, counted from 1 in each file."""
    for file in _files(path):
        numbered = _json_lines(file) if file.suffix in (".jsonl", ".json") else _table_rows(file)
        yield from numbered


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _folder_files(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder. Check the path; it is taken from the working directory.")
    if path.suffix not in (".jsonl", ".json", ".parquet", ".arrow"):
        raise DataError(
            f"{path}: found a file ending in {path.suffix!r}, expected .jsonl, .json (one object a line), .parquet, "
            ".arrow or a folder. Convert it, or rename it if it is one of these."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: found an empty file, expected at least one record. Was it cut off on its way?")
    return [path]


def _folder_files(folder: Path) -> list[Path]:
    """The files of one split: of a dataset saved by Hugging Face datasets, or of a plain folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
        raise DataError(
            f"{folder}: found a dataset of the splits {', '.join(splits)}, expected one split. "
            f"Name its folder, as in {folder / (splits[0] if splits else 'train')}."
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
            f"{folder}: found files of the splits {', '.join(splits)}, expected those of one. "
            "Name one file, or move each split to a folder of its own."
        )
    return [each for file in files for each in _files(file)]


def _json_lines(file: Path) -> Iterator[tuple[Place, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = Place(file, number)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
                raise place.error(
                    f"a line that is not JSON ({reason}): {line[:60]!r}",
                    "one JSON object a line",
                    "Mend or remove this line.",
                ) from error
            if not isinstance(row, dict):
                raise place.error(
                    f"a JSON {type(row).__name__}",
                    "one JSON object a line",
                    "Write each record as an object on a line of its own.",
                )
            yield place, row


def _table_rows(file: Path) -> Iterator[tuple[Place, Row]]:
    """Rows of a Parquet file or an Arrow stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        number += 1
                        yield Place(file, number), row
        else:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                for batch in stream:
                    for row in batch.to_pylist():
                        number += 1
                        yield Place(file, number), row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: row {number + 1}: found what cannot be read as {file.suffix[1:]} ({error}), "
            "expected a whole file. Write or copy it again."
        ) from error
