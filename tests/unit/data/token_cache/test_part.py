"""One part: what is tokenised, what is left out and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.token_cache.part import TokenRules
from lbr_dist.data.token_cache.work import plan_of
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import DataError
from tests.unit.data.token_cache.cases import ROWS, expected, jsonl, left_in, made


def test_ids_above_two_bytes_are_kept(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in tokenizer.iterdir():
        content = json.loads(path.read_text())
        if path.name == "tokenizer.json":  # raise the ids of the last merges
            vocabulary = content["model"]["vocab"]
            content["model"]["vocab"] = {key: i + 70_000 * (i > 300) for key, i in vocabulary.items()}
        (wide / path.name).write_text(json.dumps(content))
    cache = made(corpus, wide, tmp_path / "cache")
    assert list(cache) == expected(wide) and max(max(text) for text in cache) > 70_000


BAD = [
    ({"text": " \n"}, "empty"),
    ({"text": "x\0y"}, "binary"),
    ({"text": "\ufffd\x01ok" * 5}, "binary"),
    ({"text": "half \ud83d of a pair"}, "broken Unicode"),
    ({"text": "x" * 1001}, "enormous"),
    ({"text": "x" * 200_000}, "enormous"),
]


@pytest.mark.usefixtures("small_units")
def test_bad_documents_are_left_out_and_reported(tokenizer: Path, tmp_path: Path) -> None:
    rows: list[Any] = [*ROWS, b"", *(row for row, _ in BAD), *ROWS, {"text": ""}]
    path = jsonl(tmp_path / "corpus.jsonl", rows)
    said: list[str] = []
    cache = made(path, tokenizer, tmp_path / "cache", say=said.append, max_characters=1000)
    assert list(cache) == expected(tokenizer, [*ROWS, *ROWS])
    first = len(ROWS) + 2
    assert cache.report.skipped == {
        "empty": (2, f"{path}:{first}"),
        "binary": (2, f"{path}:{first + 1}"),
        "broken Unicode": (1, f"{path}:{first + 3}"),
        "enormous": (2, f"{path}:{first + 4}"),
    }
    assert said[-1].endswith(str(cache.report)) and f"2 enormous (the first: {path}:{first + 4})" in said[-1]
    # none of these is bad
    fine = jsonl(
        tmp_path / "fine.jsonl",
        [{"text": "x" * 1000}, {"text": "a\tb\r\nc\u2028\x85 é 😀"}, {"text": "\ufffd" + 20 * "x"}],
    )
    assert made(fine, tokenizer, tmp_path / "cache", max_characters=1000).report.skipped == {}


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("bad", "says", "processes"),
    [
        (b'{"text": "x', "not JSON", 1),
        (b'{"text": "\xff"}', "not JSON", 1),
        (b"[1]", "JSON list", 1),
        ({"id": "x"}, "only the fields 'id'", 1),
        ({"text": 7}, "text = 7", 2),
    ],
)
def test_a_bad_record_is_refused_with_its_line(
    tokenizer: Path, tmp_path: Path, bad: Any, says: str, processes: int
) -> None:
    path = jsonl(tmp_path / "corpus.jsonl", [*ROWS, bad, *ROWS])
    with pytest.raises(DataError) as refused:
        made(path, tokenizer, tmp_path / "cache", processes)
    assert f"{path}:{len(ROWS) + 1}: " in str(refused.value) and says in str(refused.value)
    assert left_in(tmp_path / "cache") == []


def test_a_bad_row_of_a_table_is_refused_with_its_row(tokenizer: Path, tmp_path: Path, small_units: None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": row["text"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist([*rows, {"text": None}]), tmp_path / "corpus.parquet", row_group_size=20)
    with pytest.raises(DataError, match=rf"corpus\.parquet: row {len(ROWS) + 1}: found text = None"):
        made(tmp_path / "corpus.parquet", tokenizer, tmp_path / "cache")
    pq.write_table(pa.Table.from_pylist([{"body": "x"}]), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet: row 1: found only the fields 'body'"):
        made(tmp_path / "other.parquet", tokenizer, tmp_path / "cache")


def test_a_process_does_not_hold_the_whole_file(tokenizer: Path, tmp_path: Path) -> None:
    """With memory for a fifth of the file, and for half of its longest line."""
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b'{"text": "' + b"\\u0001" * 100_000 + b'"}\n')  # 60 MB, left out before it is tokenised
        file.write(b'{"text": "' + b"x" * 40_000_000 + b'"}\n{"text": "a hand"}\n')
    code = f"""
import resource
from pathlib import Path
from lbr_dist.data.token_cache.part import TokenRules, Unit, _load, write_part
from lbr_dist.data.place import Span
_load(Path({str(tokenizer / "tokenizer.json")!r}))
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 20_000_000,) * 2)
unit = Unit(0, (Span(Path({str(path)!r}), 0, {path.stat().st_size}),))
rules = TokenRules("<u2", 200_000, False)
print(write_part(unit, Path({str(tokenizer / "tokenizer.json")!r}), Path({str(tmp_path)!r}), rules))
import sys
assert not {{"torch", "transformers"}} & set(sys.modules), "these cost each process seconds"
"""
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "documents=1" in done.stdout and "'binary': (100," in done.stdout and "'enormous': (1," in done.stdout


# ---- other kinds of files -------------------------------------------------------------------------------------------


def _csv(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "corpus.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "title", "text"])
        table.writeheader()
        table.writerows(rows)
    return folder / "corpus.csv"


def _texts(folder: Path, rows: list[dict[str, str]]) -> Path:
    (folder / "texts").mkdir()
    for number, row in enumerate(rows):
        (folder / "texts" / f"{number:03}.txt").write_text(f"{row['title']} {row['text']}")
    return folder / "texts"


@pytest.mark.parametrize("kind", ["csv", "texts", "jsonl.gz"])
def test_tokens_are_the_same_from_every_kind_of_file(
    tokenizer: Path, tmp_path: Path, small_units: None, kind: str
) -> None:
    if kind == "jsonl.gz":
        corpus = tmp_path / "corpus.jsonl.gz"
        corpus.write_bytes(gzip.compress(jsonl(tmp_path / "rows", ROWS).read_bytes()))
    else:
        corpus = {"csv": _csv, "texts": _texts}[kind](tmp_path, ROWS)
    cache = made(corpus, tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert made(corpus, tokenizer, tmp_path / "cache").folder == cache.folder


def test_a_bad_line_of_a_compressed_file_is_refused_with_its_line(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(tmp_path / "rows", [*ROWS, b"{", *ROWS]).read_bytes()))
    with pytest.raises(DataError, match=rf"corpus\.jsonl\.gz:{len(ROWS) + 1}: found a line that is not JSON"):
        made(path, tokenizer, tmp_path / "cache")


def test_mapped_columns_have_caches_of_their_own(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"abstract": "a painful hand", "text": "a pale eye", "id": "1"}]
    corpus, cache = jsonl(tmp_path / "corpus.jsonl", rows), tmp_path / "cache"
    encode = TextTokenizer(tokenizer).encode
    plain = made(corpus, tokenizer, cache)
    mapped = made(corpus, tokenizer, cache, columns={"text": "abstract"})
    assert list(plain) == encode(["a pale eye"]) and list(mapped) == encode(["a painful hand"])
    # a mapping that does not touch the texts is none
    assert made(corpus, tokenizer, cache, columns={"query": "asked", "id": "x"}).folder == plain.folder


def test_the_same_bytes_under_another_ending_have_a_cache_of_their_own(tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text('text\n"large\theart"\n')
    made_of = {made(tmp_path / name, tokenizer, tmp_path / "cache").folder for name in ("a.csv", "a.tsv")}
    assert len(made_of) == 2


def test_the_plan_of_an_unfinished_build_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """So that its finished parts are kept; a mapping of columns is another plan."""
    (tmp_path / "tokenizer.json").write_text("{}")
    rules = TokenRules("<u2", 10, False)
    assert plan_of([], 1, rules, tmp_path)["rules"] == {
        "dtype": "<u2",
        "max_characters": 10,
        "split_special_tokens": False,
    }
    mapped = plan_of([], 1, replace(rules, columns=(("text", "abstract"),)), tmp_path)
    assert mapped["rules"]["columns"] == json.loads(json.dumps(mapped))["rules"]["columns"]
