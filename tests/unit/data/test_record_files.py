"""Files cut into parts: every line is in one part, and knows its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.place import Span
from lbr_dist.data.record_files import span_rows, spans
from lbr_dist.errors import DataError


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.integers(0, 60), min_size=1), weight=st.integers(1, 200), ended=st.booleans())
def test_a_line_is_read_only_in_the_part_where_it_begins(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int], weight: int, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    content = "\n".join(json.dumps({"n": i, "x": "é" * n}) if n else "" for i, n in enumerate(lines))
    path.write_text(content + "\n" * ended, encoding="utf-8")
    found = [(str(place), row) for span in spans(path, weight) for place, row in span_rows(span)]
    assert found == [(f"{path}:{i + 1}", {"n": i, "x": "é" * n}) for i, n in enumerate(lines) if n]


def test_a_byte_order_mark_is_allowed_only_at_the_start_of_a_file(tmp_path: Path) -> None:
    line = b'\xef\xbb\xbf{"n": 0}\n'
    (tmp_path / "lines.jsonl").write_bytes(line * 2)
    first, second = spans(tmp_path / "lines.jsonl", len(line))
    assert [row for _, row in span_rows(first)] == [{"n": 0}]
    with pytest.raises(DataError, match=r"lines\.jsonl:2: .*not JSON"):
        list(span_rows(second))


def test_line_numbers_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    """However far into the file a part begins."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"n": i, "x": "x" * 200}) + "\n" for i in range(20_000)))
    size = path.stat().st_size
    place, row = next(iter(span_rows(Span(path, size // 2, size))))
    assert row is not None and str(place) == f"{path}:{row['n'] + 1}"
