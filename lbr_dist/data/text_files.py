"""Records of JSON lines and CSV, compressed or not, and of folders of plain texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from lbr_dist.data.place import Place, RawRecord, Span, kind, packing
from lbr_dist.errors import DataError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_UNPACKING = (EOFError, OSError, zlib.error)
_LONGEST_CELL = 1 << 27
"""Characters. A quote that is never closed takes the rest of the file into one cell; this bounds the memory."""


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def json_rows(span: Span, longest: int) -> Iterator[tuple[Place, RawRecord | None]]:
    """The records of the lines that begin in a span; None for a line of more than `longest` bytes."""
    packed = bool(packing(span.file))
    with _opened(span.file) as lines:
        if span.first:
            lines.seek(span.first - 1)
            _skip_line(lines)
        start = at = 0 if packed else lines.tell()
        number = 0
        while packed or at < span.last:
            try:
                line = lines.readline(longest)
                cut = len(line) == longest and not line.endswith(b"\n")
                if cut:
                    _skip_line(lines)
            except _UNPACKING as error:
                raise _not_unpacked(span.file, number, error) from error
            if not line:
                return
            number += 1
            place = Place(span.file, number, start)
            if cut:
                yield place, None
            elif line.strip():
                yield place, _json_row(place, line)
            at = 0 if packed else lines.tell()


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
            _way_out(place, line) or "Fix or remove this line.",
        ) from error
    if not isinstance(row, dict):
        raise place.error(
            f"a JSON {type(row).__name__}",
            "one JSON object a line",
            _way_out(place, line) or "Write each record as an object on its own line.",
        )
    return row


def _way_out(place: Place, line: bytes) -> str:
    """How to turn a file that is one JSON array into lines."""
    whole = place.number == 1 and not place.start and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    name = place.file.name
    return f"If the file is one array, `jq -c '.[]' {name} > {place.stem}.lines.jsonl` writes it as lines." * whole


# ---- CSV ------------------------------------------------------------------------------------------------------------


def cell_rows(span: Span) -> Iterator[tuple[Place, RawRecord | None]]:
    """The records of a CSV or TSV file under the names in its first line. All values are text."""
    csv.field_size_limit(_LONGEST_CELL)
    with _opened(span.file) as content:
        reader = csv.reader(_decoded(content), delimiter=_SEPARATORS[kind(span.file)], strict=True)
        header: list[str] = []
        while True:
            place = Place(span.file, reader.line_num + 1)
            try:
                cells = next(reader, None)
            except _UNPACKING as error:
                raise _not_unpacked(span.file, reader.line_num, error) from error
            except csv.Error as error:
                raise place.error(
                    f"a record that cannot be read ({error})",
                    "values that are quoted as CSV writers do",
                    "Put a value with quotes or line breaks in quotes, and double the quotes in it.",
                ) from error
            except UnicodeDecodeError as error:
                raise _not_utf8(Place(span.file, reader.line_num + 1), error) from error
            if cells is None:
                return
            if cells and not header:
                header = _checked_header(place, cells)
            elif cells:
                if len(cells) != len(header):
                    raise place.error(
                        f"{len(cells)} values",
                        f"{len(header)}, one for each column of the header",
                        "Put a value that holds the separator in quotes, or remove this record.",
                    )
                yield place, dict(zip(header, cells, strict=True))


def _decoded(lines: IO[bytes]) -> Iterator[str]:
    """The lines as text. Decoded one by one, so that an error is the line's."""
    encoding = "utf-8-sig"
    for line in lines:
        yield line.decode(encoding)
        encoding = "utf-8"


def _checked_header(place: Place, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise place.error(
            f"the column {twice[0]!r} twice",
            "a header with the name of each column",
            "Give each column a name of its own; if the file has no header, write one as its first line.",
        )
    others = [character for character in ",;\t|" if character in names[0]]
    if len(names) == 1 and others:
        raise place.error(
            f"the one column {names[0]!r}",
            f"columns separated by {_SEPARATORS[kind(place.file)]!r}",
            f"It seems to be separated by {others[0]!r}: write it again with another separator, or rename it to .tsv "
            "if that is a tab.",
        )
    return names


# ---- plain texts ----------------------------------------------------------------------------------------------------


def text_rows(span: Span, longest: int) -> Iterator[tuple[Place, RawRecord | None]]:
    """The one document in a text file; None if it has more than `longest` bytes."""
    place = Place(span.file, 1)
    if 0 <= longest < span.file.stat().st_size:
        yield place, None
        return
    try:
        text = span.file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error
    yield place, {"text": text.replace("\r\n", "\n")}


def _not_utf8(place: Place, error: UnicodeDecodeError) -> DataError:
    return place.error(
        f"bytes that are not UTF-8 ({error.reason}): {error.object[error.start : error.start + 8]!r}",
        "UTF-8",
        f"Convert the file, for example `iconv -f WINDOWS-1252 -t UTF-8 {place.file.name}`, or remove this record.",
    )


# ---- compressed files -----------------------------------------------------------------------------------------------


def _opened(file: Path) -> IO[bytes]:
    """A file's bytes, unpacked."""
    if packing(file) == ".gz":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if packing(file) == ".zst":
        import pyarrow as pa

        stream: Any = pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return file.open("rb")


def _not_unpacked(file: Path, lines: int, error: Exception) -> DataError:
    """Names a compressed file that cannot be unpacked, and how far it could be read. Raises others' errors again."""
    if not packing(file):
        raise error
    return DataError(
        f"{file}: found data that cannot be unpacked after line {lines} ({error}), expected a complete "
        f"{packing(file)[1:]} file. Write or copy it again."
    )
