"""Files cut into parts: every line is in one part, and knows its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.place import Span
from lbr_dist.data.record_files import also_read_as, record_files, records, span_rows, spans
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


# ---- folders --------------------------------------------------------------------------------------------------------


def _files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    return folder


def _names(path: Path, folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in record_files(path)]


def test_the_hubs_folders_are_read_split_by_split(tmp_path: Path) -> None:
    shards = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    one = _files(tmp_path / "one", "README.md", ".gitattributes", *shards)
    assert _names(one, one) == shards
    two = _files(tmp_path / "two", "README.md", *shards, "data/test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=rf"splits test, train.* such as {two}/test"):
        record_files(two)
    assert _names(two / "train", two) == shards
    with pytest.raises(DataError, match="no such file"):
        record_files(two / "validation")
    deep = _files(tmp_path / "deep", "README.md", "en/train.jsonl.gz")
    with pytest.raises(DataError, match=rf"only further down.*: {deep}/en\."):
        record_files(deep)


def test_a_folder_of_texts_has_all_texts_below_it(tmp_path: Path) -> None:
    folder = _files(tmp_path / "notes", "b.txt", "a/c d.md", "a/.hidden.txt", ".git/x.txt", "picture.png", "README.md")
    assert _names(folder, folder) == ["README.md", "a/c d.md", "b.txt"]
    with pytest.raises(DataError, match=r"one text file, expected a folder"):
        record_files(folder / "b.txt")


def test_a_folder_of_other_files_has_one_kind(tmp_path: Path) -> None:
    folder = _files(tmp_path / "csv", "b.csv", "a.csv", "notes.txt", "settings.json")
    assert _names(folder, folder) == ["a.csv", "b.csv"]
    _files(folder, "a.jsonl.gz")
    with pytest.raises(DataError, match=r"the kinds \.csv, \.jsonl\.gz"):
        record_files(folder)
    _files(folder, "a.jsonl")  # as it always was: these are read, and no others
    assert _names(folder, folder) == ["a.jsonl"]
    (folder / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl: found an empty file"):
        record_files(folder)


# ---- columns of other names -----------------------------------------------------------------------------------------


def test_mapped_columns_take_the_place_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"pmid": 7, "abstract": "A", "text": "other", "title": "T"}\n{"id": "8", "text": "B"}\n')
    found = [row for _, row in records(path, {"text": "abstract", "id": "pmid"})]
    assert found == [{"text": "A", "id": 7, "title": "T"}, {"id": "8", "text": "B"}]
    assert next(records(path, {"text": "title", "title": "text"}))[1] == {
        "pmid": 7,
        "abstract": "A",
        "text": "T",
        "title": "other",
    }


def test_a_table_is_read_by_its_mapped_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"abstract": "A", "title": "T", "n": 1}]), tmp_path / "a.parquet")
    (part,) = spans(tmp_path / "a.parquet", 1000)
    (read,) = span_rows(part, ("text", "title"), columns={"text": "abstract"})
    assert read[1] == {"text": "A", "title": "T"}


def test_what_the_records_depend_on_besides_their_bytes() -> None:
    """Nothing for what was always read, so that fingerprints stay those of earlier versions."""
    assert also_read_as([Path("a.jsonl"), Path("b.json"), Path("c.parquet"), Path("d.arrow")]) == []
    kinds = [also_read_as([Path(name)]) for name in ("a.csv", "a.tsv", "a.txt", "a.md", "a.jsonl.gz", "a.jsonl.zst")]
    assert len({*map(tuple, kinds)}) == 6 and [] not in kinds
    assert also_read_as([Path("a.jsonl")], {"text": "abstract"}) == ["text=abstract"]
