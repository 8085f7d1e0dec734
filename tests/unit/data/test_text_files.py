"""CSV, compressed lines and plain texts: what is read, and the line or file that each mistake is reported with."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.place import Span
from lbr_dist.data.record_files import span_rows, spans
from lbr_dist.errors import DataError


def rows(path: Path, longest: int = -1) -> list[tuple[str, Any]]:
    return [(str(place), row) for place, row in span_rows(Span(path, 0, sys.maxsize), longest_line=longest)]


def packed(path: Path, content: bytes) -> Path:
    """The content as .gz or .zst, in two members or frames, as `cat a.gz b.gz` makes them."""
    import pyarrow as pa

    half = len(content) // 2
    parts = content[:half], content[half:]
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    else:
        with path.open("wb") as file:
            for part in parts:
                sink = pa.BufferOutputStream()
                with pa.CompressedOutputStream(sink, "zstd") as stream:
                    stream.write(part)
                file.write(sink.getvalue().to_pybytes())
    return path


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_has_quotes_line_breaks_empty_cells_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    content = '\ufeffid,text,title\r\n007,"one, ""two""\nthree",\r\n\r\n8,é,T\r\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert rows(tmp_path / "a.csv") == [
        (f"{tmp_path / 'a.csv'}:2", {"id": "007", "text": 'one, "two"\nthree', "title": ""}),
        (f"{tmp_path / 'a.csv'}:5", {"id": "8", "text": "é", "title": "T"}),
    ]
    (tmp_path / "a.tsv").write_text("id\ttext\n1\ta, b\n")
    assert rows(tmp_path / "a.tsv") == [(f"{tmp_path / 'a.tsv'}:2", {"id": "1", "text": "a, b"})]


def test_a_cell_longer_than_the_standard_librarys_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1," + "x" * 200_000 + "\n")
    ((_, row),) = rows(tmp_path / "a.csv")
    assert len(row["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,text\n1,a\n2,b,c\n", [":3: found 3 values", "expected 2"]),
        (b"id,text\n1\n", [":2: found 1 values"]),
        (b'id,text\n1,a\n2,"b\n3,c\n', [":3: found a record that cannot be read", "double the quotes"]),
        (b"id,text\n1,a\n2,\xe9\n", [":3: found bytes that are not UTF-8", "iconv"]),
        (b"id,id\n1,a\n", [":1: found the column 'id' twice"]),
        (b"id;text\n1;a\n", [":1: found the one column 'id;text'", "separated by ';'"]),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, content: bytes, says: list[str]
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError) as refused:
        rows(tmp_path / "a.csv")
    assert [each for each in says if each not in str(refused.value)] == []


# ---- compressed files -----------------------------------------------------------------------------------------------

LINES = b"\xef\xbb\xbf" + b"".join(json.dumps({"n": i, "x": "é" * i}).encode() + b"\r\n" for i in range(50))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_are_one_part_with_the_same_records_and_places(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"a.jsonl{ending}", LINES)
    (part,) = spans(path, 10)
    found = [(str(place), row) for place, row in span_rows(part)]
    assert found == [(f"{path}:{i + 1}", {"n": i, "x": "é" * i}) for i in range(50)]
    assert [row is None for _, row in rows(path, 150)] == [
        len(json.dumps({"n": i, "x": "é" * i})) + 2 > 150 for i in range(50)
    ]
    csv = packed(tmp_path / f"a.csv{ending}", b"id,text\n1,a\n")
    assert rows(csv) == [(f"{csv}:2", {"id": "1", "text": "a"})]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off_is_refused_with_how_far_it_goes(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"a.jsonl{ending}", b"".join(b'{"n": %d}\n' % i for i in range(5_000)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        DataError, match=rf"a\.jsonl\{ending}: found data that cannot be unpacked after line \d+ .*copy"
    ):
        rows(path)
    path.write_bytes(b'{"n": 0}\n')
    with pytest.raises(DataError, match="cannot be unpacked after line 0"):
        rows(path)
    with pytest.raises(DataError, match=rf"{ending}:3: found a line that is not JSON"):
        rows(packed(path, b"{}\n{}\n{\n"))


# ---- JSON arrays, plain texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['[{"id": 1}]', '[\n  {"id": 1}\n]'])
def test_a_file_that_is_one_array_is_refused_with_the_command_that_writes_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json:1: .*jq -c '\.\[\]' a\.json > a\.lines\.jsonl"):
        rows(tmp_path / "a.json")


def test_a_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwé\n".encode())
    assert rows(path) == [(str(path), {"text": "one\ntwé\n"})]
    assert rows(path, 5) == [(str(path), None)]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: found bytes that are not UTF-8 .*iconv -f WINDOWS-1252"):
        rows(path)
