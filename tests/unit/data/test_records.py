"""Corpora and pairs: every known format, and every kind of error in a file."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.data.records import check_columns, read_corpus, read_pairs, write_jsonl
from lbr_dist.errors import ConfigError, DataError

CORPUS = {"d1": "Fever. A raised body temperature.", "d2": "Chill. A feeling of cold.", "d3": "Cough."}
OURS = [
    {"id": "q1", "query": "hot", "positive_ids": ["d1"], "negative_ids": ["d2", "d1"], "source": "lay"},
    {"query": "cold", "positive_ids": ["d2", "d3"]},
]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    for number, row in enumerate(rows):
        jsonl(path / f"part-{number}.jsonl", row)
    return path


def packed(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cells(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def hub_folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    for number, row in enumerate(rows):
        parquet(path / "data" / f"train-{number:05d}-of-{len(rows):05d}.parquet", [row])
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": lambda path, rows: jsonl(path.with_suffix(".jsonl"), *rows),
    "parquet": lambda path, rows: parquet(path.with_suffix(".parquet"), rows),
    "dataset": saved_dataset,
    "folder": folder,
    "jsonl.gz": lambda path, rows: packed(path.with_suffix(".jsonl.gz"), rows),
    "the hub's": hub_folder,
}


@pytest.mark.parametrize("kind", [*WRITERS, "csv"])
def test_corpus_reads_the_same_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    rows = [{"id": document, "text": text} for document, text in CORPUS.items()]
    writer = cells if kind == "csv" else WRITERS[kind]
    path = tmp_path / ("corpus.csv" if kind == "csv" else "corpus")
    assert list(read_corpus(writer(path, rows)).items()) == list(CORPUS.items())


@pytest.mark.parametrize("kind", WRITERS)
def test_pairs_read_the_same_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    found = read_pairs(WRITERS[kind](tmp_path / "pairs", OURS), CORPUS)
    assert [(pair.query, pair.positives, pair.negatives) for pair in found.pairs] == [
        ("hot", ("d1",), ("d2",)),
        ("cold", ("d2", "d3"), ()),
    ]
    assert found.pairs[0].id == "q1" and found.pairs[0].source == "lay"
    assert found.documents == CORPUS
    assert found.dropped_negatives == 1


def test_corpus_of_the_retrieval_toolkits_has_titles_and_other_id_fields(tmp_path: Path) -> None:
    rows = ({"_id": 7, "title": "Fever", "text": "Heat."}, {"docid": "8", "title": "", "text": "Cold."})
    assert read_corpus(jsonl(tmp_path / "corpus.jsonl", *rows)) == {"7": "Fever Heat.", "8": "Cold."}


def test_documents_without_ids_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "corpus.jsonl", {"text": "A"}, "", {"text": "B"})
    assert read_corpus(path) == {"corpus.jsonl:1": "A", "corpus.jsonl:3": "B"}
    assert read_corpus(cells(tmp_path / "a.csv", [{"text": "A\nB"}, {"text": "C"}])) == {
        "a.csv:2": "A\nB",
        "a.csv:4": "C",
    }
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a b.txt").write_text("A")
    (tmp_path / "notes" / "deep" / "b.md").write_text("B")
    assert read_corpus(tmp_path / "notes") == {"a b.txt": "A", "deep/b.md": "B"}
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: found id = 'x', expected no id, as in the file's first"):
        read_corpus(jsonl(tmp_path / "mixed.jsonl", {"text": "A"}, {"id": "x", "text": "B"}))


def test_columns_of_other_names(tmp_path: Path) -> None:
    columns = {"id": "pmid", "text": "abstract", "query": "asked", "positive_ids": "found"}
    corpus = jsonl(tmp_path / "corpus.jsonl", {"pmid": 7, "abstract": "A", "title": "T"})
    pairs = jsonl(tmp_path / "pairs.jsonl", {"asked": "hot", "found": ["7"]})
    (pair,) = read_pairs(pairs, read_corpus(corpus, columns), columns).pairs
    assert (pair.query, pair.positives) == ("hot", ("7",)) and read_corpus(corpus, columns) == {"7": "T A"}
    check_columns(columns, [str(corpus), str(pairs)])
    with pytest.raises(ConfigError, match=r"found \{text: abstrct\}, but no file .* they have 'abstract', 'asked'"):
        check_columns({"text": "abstrct"}, [str(corpus), str(pairs)])
    with pytest.raises(DataError, match=r"data\.columns: \{text: NAME\}"):
        read_corpus(corpus, {"id": "pmid"})


SAME = {
    "sentence-transformers": {"anchor": "hot", "positive": "A", "negative": "B", "negative_1": "C", "negative_2": None},
    "numbered in order": {"query": "hot", "positive": "A", "negative_10": "C", "negative_2": "B"},
    "list of negatives": {"query": "hot", "positive": "A", "negatives": ["B", "C"]},
    "tevatron": {
        "query_id": "1",
        "query": "hot",
        "positive_passages": [{"docid": "a", "title": "", "text": "A"}],
        "negative_passages": [{"docid": "b", "text": "B"}, {"docid": "c", "text": "C"}],
    },
    "FlagEmbedding": {"query": "hot", "pos": ["A"], "neg": ["B", "C"], "pos_scores": [1.0], "prompt": "p"},
    "question and answer": {"question": "hot", "answer": "A", "negatives": ["B", "C"]},
    "two sentences": {"sentence1": "hot", "sentence2": "A", "negative_1": "B", "negative_2": "C", "score": 1.0},
    "ms-swift": {"query": "hot", "response": "A", "rejected_response": ["B", "C"], "label": 1.0},
    "ms-swift messages": {
        "messages": [{"role": "user", "content": "hot"}],
        "positive_messages": [[{"role": "user", "content": "A"}]],
        "negative_messages": [[{"role": "user", "content": "B"}], [{"role": "user", "content": "C"}]],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_other_formats_bring_their_texts(tmp_path: Path, name: str) -> None:
    found = read_pairs(jsonl(tmp_path / "pairs.jsonl", SAME[name]), {})
    (pair,) = found.pairs
    assert pair.query == "hot"
    assert [found.documents[document] for document in pair.positives] == ["A"]
    assert [found.documents[document] for document in pair.negatives] == ["B", "C"]
    assert pair.source == "pairs"


def test_equal_texts_are_one_document_and_never_their_own_negative(tmp_path: Path) -> None:
    rows = ({"anchor": "x", "positive": "A", "negatives": ["A", "B", "B"]}, {"anchor": "y", "positive": "B"})
    found = read_pairs(jsonl(tmp_path / "pairs.jsonl", *rows), {})
    assert sorted(found.documents.values()) == ["A", "B"]
    assert all(document.startswith("text-") and len(document) == 21 for document in found.documents)
    assert found.pairs[0].negatives == found.pairs[1].positives
    assert found.dropped_negatives == 1


def test_a_passage_without_text_is_taken_from_the_corpus(tmp_path: Path) -> None:
    row = {"query": "hot", "positive_passages": [{"docid": "d1"}]}
    assert read_pairs(jsonl(tmp_path / "pairs.jsonl", row), CORPUS).documents == {"d1": CORPUS["d1"]}


def test_tevatron_2_names_documents_of_the_corpus(tmp_path: Path) -> None:
    row = {"query_id": 3, "query_text": "hot", "positive_document_ids": ["d1"], "negative_document_ids": ["d2", "d3"]}
    (pair,) = read_pairs(jsonl(tmp_path / "pairs.jsonl", row | {"query_image": None}), CORPUS).pairs
    assert (pair.id, pair.query, pair.positives, pair.negatives) == ("3", "hot", ("d1",), ("d2", "d3"))


def test_pairs_in_csv_may_lack_a_negative(tmp_path: Path) -> None:
    rows = [{"question": "hot", "answer": "A", "negative": "B"}, {"question": "cold", "answer": "C", "negative": ""}]
    found = read_pairs(cells(tmp_path / "pairs.csv", rows), {})
    assert [len(pair.negatives) for pair in found.pairs] == [1, 0]
    with pytest.raises(DataError, match=r"pairs\.csv:2: found answer = ''"):
        read_pairs(cells(tmp_path / "pairs.csv", [rows[0] | {"answer": ""}]), {})


def test_a_packed_file_gives_pairs_the_same_ids_and_source_as_when_it_is_unpacked(tmp_path: Path) -> None:
    found = [read_pairs(WRITERS[kind](tmp_path / "pairs", OURS[1:]), CORPUS).pairs for kind in ("jsonl", "jsonl.gz")]
    assert found[0] == found[1] and found[0][0].source == "pairs"


HALF = "large heart \\ud83d cut"


@pytest.mark.parametrize(
    "line",
    [
        f'{{"anchor": "{HALF}", "positive": "x"}}',
        f'{{"anchor": "x", "positive": "{HALF}"}}',
        f'{{"anchor": "x", "positive": "y", "negative": "{HALF}"}}',
        f'{{"anchor": "x", "positive": "y", "id": "{HALF}"}}',
        f'{{"anchor": "x", "positive": "y", "source": "{HALF}"}}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    good = '{"anchor": "fine \\ud83d\\ude00", "positive": "z"}'
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: found half of a surrogate pair in .*heart \\ud83d cut"):
        read_pairs(jsonl(tmp_path / "pairs.jsonl", good, line), {})


@pytest.mark.parametrize("field", ["id", "text", "title"])
def test_half_of_a_surrogate_pair_in_a_document(tmp_path: Path, field: str) -> None:
    row = json.dumps({"id": "d2", "text": "x", "title": "y"} | {field: "HALF"}).replace("HALF", HALF)
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: found half of a surrogate pair"):
        read_corpus(jsonl(tmp_path / "corpus.jsonl", GOOD, row))


GOOD = {"id": "d1", "text": "x"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, {"id": "d2", "text": " "}], ["corpus.jsonl:2", "text", "not empty"]),
        ([GOOD, {"id": "d2"}], ["corpus.jsonl:2", "'id'", "text"]),
        ([GOOD, {"text": "x"}], ["corpus.jsonl:2", "'text'", "id"]),
        ([GOOD, {"id": True, "text": "x"}], ["corpus.jsonl:2", "id = True"]),
        ([GOOD, "", GOOD], ["corpus.jsonl:3", "'d1'", "corpus.jsonl:1"]),
        ([GOOD, '{"id": "d2", "te'], ["corpus.jsonl:2", "not JSON", '{"id": "d2"']),
        ([GOOD, "[1]"], ["corpus.jsonl:2", "JSON list"]),
        (['[{"id": "d1", "text": "x"}]'], ["corpus.jsonl:1", "one JSON object a line"]),
        (["", ""], ["corpus.jsonl", "no documents"]),
        ([], ["corpus.jsonl", "empty file"]),
    ],
)
def test_a_bad_corpus_is_refused_with_its_line(tmp_path: Path, rows: list[Any], says: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        read_corpus(jsonl(tmp_path / "corpus.jsonl", *rows))
    assert [each for each in says if each not in str(refused.value)] == []


PAIR = {"query": "hot", "positive_ids": ["d1"]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIR, {"query": "hot", "positive_ids": []}], ["pairs.jsonl:2", "no positive"]),
        ([PAIR, {"query": "hot", "positive_ids": None}], ["pairs.jsonl:2", "no positive"]),
        ([PAIR, {"query": "", "positive_ids": ["d1"]}], ["pairs.jsonl:2", "query = ''"]),
        ([PAIR, {"query": "hot", "positive_ids": ["d9"]}], ["pairs.jsonl:2", "'d9'", "3 documents"]),
        ([PAIR, {**PAIR, "negative_ids": ["d9"]}], ["pairs.jsonl:2", "'d9'"]),
        ([PAIR, {"query": "hot", "positive_ids": "d1"}], ["pairs.jsonl:2", "positive_ids = 'd1'", "a list"]),
        ([PAIR, {"anchor": "hot", "positive": "x"}], ["pairs.jsonl:2", "sentence-transformers", "lbr"]),
        (
            [{"prompt": "hot", "reply": "x"}],
            ["pairs.jsonl:1", "'prompt', 'reply'", "anchor + positive", "data.columns"],
        ),
        ([{**PAIR, "id": "a"}, {**PAIR, "id": "a"}], ["pairs.jsonl:2", "'a'", "pairs.jsonl:1"]),
        ([{"anchor": "hot", "positive": None}], ["pairs.jsonl:1", "positive"]),
        ([{"anchor": "hot", "positive": ["x", ""]}], ["pairs.jsonl:1", "positive = ''"]),
        ([{"query": "hot", "response": "x", "label": 0}], ["pairs.jsonl:1", "label = 0"]),
        ([{"sentence1": "hot", "sentence2": "x", "score": 3.2}], ["pairs.jsonl:1", "score = 3.2"]),
        ([{"query_text": "hot", "positive_document_ids": ["d9"]}], ["pairs.jsonl:1", "'d9'"]),
        ([{"query": "hot", "pos": []}], ["pairs.jsonl:1", "no positive"]),
        ([{"query": "hot", "positive_passages": ["x"]}], ["pairs.jsonl:1", "'x'", "docid"]),
        (
            [{"query": "hot", "positive_passages": [{"docid": "d1", "text": "y"}]}],
            ["pairs.jsonl:1", "a different text"],
        ),
        ([{"messages": [], "positive_messages": []}], ["pairs.jsonl:1", "messages = []"]),
        ([""], ["pairs.jsonl", "no pairs"]),
    ],
)
def test_bad_pairs_are_refused_with_their_line(tmp_path: Path, rows: list[Any], says: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        read_pairs(jsonl(tmp_path / "pairs.jsonl", *rows), CORPUS)
    assert [each for each in says if each not in str(refused.value)] == []


def test_bad_rows_of_tables_are_refused_with_their_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.parquet: row 2: .*no positive"):
        read_pairs(parquet(tmp_path / "pairs.parquet", [PAIR, {"query": "hot", "positive_ids": []}]), CORPUS)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet.*parquet"):
        read_corpus(tmp_path / "broken.parquet")


def test_bad_bytes_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b'{"id": "d1", "text": "x"}\n{"id": "d2", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: .*not JSON"):
        read_corpus(tmp_path / "corpus.jsonl")


def test_a_path_that_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_corpus(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"no \.jsonl, \.parquet, \.arrow, \.csv"):
        read_corpus(tmp_path)
    (tmp_path / "corpus.xlsx").write_text("id,text\n")
    with pytest.raises(DataError, match=r"\.xlsx.*\.csv.*\.parquet"):
        read_corpus(tmp_path / "corpus.xlsx")
    jsonl(tmp_path / "train-00000.jsonl", GOOD)
    jsonl(tmp_path / "test-00000.jsonl", GOOD)
    with pytest.raises(DataError, match="splits test, train"):
        read_corpus(tmp_path)


def test_a_dataset_with_several_splits_is_refused_and_the_splits_named(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"splits test, train.*both.test"):
        read_corpus(tmp_path / "both")
    assert read_corpus(tmp_path / "both" / "train") == {"d1": "x"}


# ---- write_jsonl --------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))


@settings(max_examples=100, deadline=None)
@given(corpus=st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=8))
def test_any_texts_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> None:
    """Including unusual line separators, control characters and byte order marks."""
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    assert write_jsonl(path, ({"text": text, "id": document} for document, text in corpus.items())) == len(corpus)
    assert list(read_corpus(path).items()) == list(corpus.items())


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    write_jsonl(path, [{"b": 1, "a": "ä"}])
    assert path.read_bytes() == '{"a": "ä", "b": 1}\n'.encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_jsonl(path, [{"a": 1}, {"a": bad}])
    assert path.read_bytes() == '{"a": "ä", "b": 1}\n'.encode()
    assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
