"""Rows of Parquet files and of Arrow streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lbr_dist.data.place import Place, RawRecord, Span
from lbr_dist.errors import DataError

_READ_ROWS = 1000


def table_rows(span: Span, columns: tuple[str, ...]) -> Iterator[tuple[Place, RawRecord]]:
    """The rows of a span's row groups or record batches, with the columns that `span_rows` says."""
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


def table_groups(file: Path) -> Iterator[tuple[int, int]]:
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
