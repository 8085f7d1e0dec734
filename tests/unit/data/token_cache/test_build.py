"""The token cache: the same tokens from every format and number of processes, and whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lbr_dist
from lbr_dist.data.record_files import Span, span_rows, spans
from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache import part as token_parts
from lbr_dist.data.token_cache.build import build
from lbr_dist.data.token_cache.cache import Pieces, TokenCache
from lbr_dist.data.tokenizer import TextTokenizer
from lbr_dist.errors import DataError, LaunchError
from lbr_dist.storage import fingerprint, whole_folder
from tests import tiny

ROWS = [
    {"id": str(i), "text": f"{text} \n", "title": f"Title {i}"}
    for i, text in enumerate(list(tiny.texts().values()) * 3)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus is cut in many parts, and given to processes, as a large one is."""
    monkeypatch.setattr(build_tokens, "_UNIT", 5000)
    monkeypatch.setattr(build_tokens, "_SMALL", 0)


def jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def made(corpus: Path, tokenizer: Path, cache: Path, processes: int = 1, **more: Any) -> TokenCache:
    return build(corpus, tokenizer, cache, processes, more.pop("say", lambda text: None), **more)


def expected(tokenizer: Path, rows: list[dict[str, str]] = ROWS) -> list[tuple[int, ...]]:
    return TextTokenizer(tokenizer).encode([f"{row['title']} {row['text']}" for row in rows])


# ---- what is in it ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
def test_any_number_of_processes_gives_the_same_files(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    truth = expected(tokenizer)
    contents = []
    for processes in (1, 2, 3):
        cache = made(corpus, tokenizer, tmp_path / f"cache{processes}", processes)
        assert list(cache) == truth and len(cache) == len(truth)
        assert cache.num_tokens == sum(map(len, truth)) and cache[-1] == truth[-1] and cache[3:5] == truth[3:5]
        cache.verify()
        files = sorted(path for path in cache.folder.iterdir() if path.name.startswith("part"))
        assert len(files) > 10
        contents.append({path.name: path.read_bytes() for path in files} | {"folder": cache.folder.name.encode()})
    assert contents[0] == contents[1] == contents[2]


def as_json(path: Path) -> Path:
    return jsonl(path.with_suffix(".json"), ROWS)


def as_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path.with_suffix(".parquet"), row_group_size=17)
    return path.with_suffix(".parquet")


def as_dataset(path: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path), num_shards=2)
    return path


def as_arrow(path: Path) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=13):
            stream.write_batch(batch)
    return path.with_suffix(".arrow")


def as_folder(path: Path) -> Path:
    path.mkdir()
    for first in range(0, len(ROWS), 50):
        jsonl(path / f"part-{first:04d}.jsonl", ROWS[first : first + 50])
    return path


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("write", [as_json, as_parquet, as_dataset, as_arrow, as_folder])
def test_every_format_gives_the_same_tokens(tmp_path: Path, tokenizer: Path, write: Callable[[Path], Path]) -> None:
    cache = made(write(tmp_path / "corpus"), tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert len(list(cache.folder.glob("*.tokens"))) > 1


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.integers(0, 60), min_size=1), weight=st.integers(1, 200), ended=st.booleans())
def test_a_line_is_in_the_one_part_where_it_begins(
    tmp_path_factory: pytest.TempPathFactory, lines: list[int], weight: int, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    content = "\n".join(json.dumps({"n": i, "x": "é" * n}) if n else "" for i, n in enumerate(lines))
    path.write_text(content + "\n" * ended, encoding="utf-8")
    found = [(str(place), row) for span in spans(path, weight) for place, row in span_rows(span)]
    assert found == [(f"{path}:{i + 1}", {"n": i, "x": "é" * n}) for i, n in enumerate(lines) if n]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=12),
    st.integers(1, 15),
    st.integers(1, 17),
    st.data(),
)
def test_pieces_are_those_of_lists(texts: list[list[int]], longest: int, shortest: int, data: st.DataObject) -> None:
    class Lists:
        lengths = np.array([len(text) for text in texts], np.uint32)

        def span(self, document: int, start: int, stop: int) -> tuple[int, ...]:
            return tuple(texts[document][start:stop])

    # as `targets.pieces` does it, of which 2 is the shortest
    cut = [tuple(text[i : i + longest]) for text in texts for i in range(0, len(text), longest)]
    truth = [piece for piece in cut if len(piece) >= shortest]
    found = Pieces(Lists(), longest, shortest)
    assert len(found) == len(truth) and list(found) == truth
    if truth:
        index = data.draw(st.integers(-len(truth), len(truth) - 1))
        assert found[index] == truth[index]
    with pytest.raises(IndexError):
        found[len(truth)]


def test_pieces_of_a_cache_are_those_of_its_texts(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    from tests.tiny import pieces

    cache = made(corpus, tokenizer, tmp_path / "cache")
    for longest in (1, 5, 16):
        assert list(Pieces(cache, longest)) == pieces(expected(tokenizer), longest)


def test_ids_above_two_bytes_are_kept(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in tokenizer.iterdir():
        content = json.loads(path.read_text())
        if path.name == "tokenizer.json":  # the ids of the last merges are moved up
            vocabulary = content["model"]["vocab"]
            content["model"]["vocab"] = {key: i + 70_000 * (i > 300) for key, i in vocabulary.items()}
        (wide / path.name).write_text(json.dumps(content))
    cache = made(corpus, wide, tmp_path / "cache")
    assert list(cache) == expected(wide) and max(max(text) for text in cache) > 70_000


# ---- what is left out, and what is refused ------------------------------------------------------------------------

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
    # nothing of this is bad
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


def test_the_other_processes_stop_at_an_error(
    tokenizer: Path, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Future[Any]] = []

    class Pool(ProcessPoolExecutor):
        def submit(self, *arguments: Any, **more: Any) -> Future[Any]:
            futures.append(super().submit(*arguments, **more))
            return futures[-1]

    monkeypatch.setattr(build_tokens, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: "):
        made(jsonl(tmp_path / "corpus.jsonl", [b"bad", *ROWS * 100]), tokenizer, tmp_path / "cache", 2)
    assert isinstance(futures[-1].exception(), BrokenProcessPool)


def test_a_byte_order_mark_belongs_at_the_beginning_of_a_file(tmp_path: Path) -> None:
    line = b'\xef\xbb\xbf{"n": 0}\n'
    (tmp_path / "lines.jsonl").write_bytes(line * 2)
    first, second = spans(tmp_path / "lines.jsonl", len(line))
    assert [row for _, row in span_rows(first)] == [{"n": 0}]
    with pytest.raises(DataError, match=r"lines\.jsonl:2: .*not JSON"):
        list(span_rows(second))


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


def test_nothing_but_bad_documents_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no documents to learn from, 2 empty \(the first: .*corpus\.jsonl:1\)"):
        made(jsonl(tmp_path / "corpus.jsonl", [{"text": ""}, {"text": " "}]), tokenizer, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_process_holds_a_few_lines_not_the_file(tokenizer: Path, tmp_path: Path) -> None:
    """With room for a fifth of the file, and for half of its longest line."""
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b'{"text": "' + b"\\u0001" * 100_000 + b'"}\n')  # 60 MB, left out before it is tokenised
        file.write(b'{"text": "' + b"x" * 40_000_000 + b'"}\n{"text": "a hand"}\n')
    code = f"""
import resource
from pathlib import Path
from lbr_dist.data.token_cache.part import TokenRules, Unit, _load, write_part
from lbr_dist.data.record_files import Span
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


# ---- which cache is used ------------------------------------------------------------------------------------------


def test_a_cache_that_is_there_is_used_and_a_changed_one_is_not(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -1)  # files of this second are remembered
    said: list[str] = []
    first = made(corpus, tokenizer, tmp_path / "cache", say=said.append)
    said.clear()
    assert made(corpus, tokenizer, tmp_path / "cache", say=said.append).folder == first.folder
    assert len(said) == 1  # nothing was tokenised
    times = corpus.stat()
    content = corpus.read_bytes()
    corpus.write_bytes(content.replace(b"hand", b"HAND", 1))
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same inode, same time of writing
    second = made(corpus, tokenizer, tmp_path / "cache")
    assert second.folder != first.folder
    corpus = corpus.rename(corpus.with_name("renamed.jsonl"))
    assert made(corpus, tokenizer, tmp_path / "cache").folder == second.folder
    assert made(corpus, tokenizer, tmp_path / "cache", max_characters=99).folder != second.folder
    settings_file = tokenizer / "tokenizer_config.json"
    before = settings_file.read_text()
    settings_file.write_text(before + " ")
    assert made(corpus, tokenizer, tmp_path / "cache").folder != second.folder
    settings_file.write_text(before)


def test_the_hash_of_a_file_is_kept_once_it_has_settled(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = fingerprint._block_digest
    monkeypatch.setattr(fingerprint, "_block_digest", lambda file, at: read.append(file) or real(file, at))
    first = fingerprint.fingerprint([corpus], 2, tmp_path / "known")
    assert fingerprint.fingerprint([corpus], 2, tmp_path / "known") == first
    assert len(read) == 2  # it is too young
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -1)
    assert {fingerprint.fingerprint([corpus], 2, tmp_path / "known") for _ in range(3)} == {first}
    assert len(read) == 3
    (entry,) = (tmp_path / "known").iterdir()
    entry.write_text("{")
    assert fingerprint.fingerprint([corpus], 2, tmp_path / "known") == first


def test_blocks_and_files_have_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 4)
    contents = {"a": b"0123456789", "b": b"4567012389", "c": b"0123", "d": b"456789"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    sets = ["a", "b", "c", "d", "cd", "dc", "ac"]
    keys = {fingerprint.fingerprint([tmp_path / name for name in names], 3, tmp_path / "k") for names in sets}
    assert len(keys) == len(sets)


def test_a_corpus_that_changes_meanwhile_is_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = token_parts.write_part

    def write_part(*arguments: Any) -> Any:
        part = real(*arguments)
        with corpus.open("a") as file:
            file.write('{"text": "late"}\n')
        return part

    monkeypatch.setattr(build_tokens, "write_part", write_part)
    with pytest.raises(DataError, match=r"corpus\.jsonl: it was changed while it was read"):
        made(corpus, tokenizer, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_damaged_cache_is_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = made(corpus, tokenizer, tmp_path / "cache").folder
    part = folder / "part-00000.tokens"
    content = part.read_bytes()
    part.write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"part-00000\.tokens: found {len(content) - 2} bytes, .*Delete {folder}"):
        made(corpus, tokenizer, tmp_path / "cache")
    part.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(DataError, match=r"part-00000\.tokens: found checksum"):
        made(corpus, tokenizer, tmp_path / "cache").verify()
    part.unlink()
    with pytest.raises(DataError, match=r"part-00000\.tokens: found no file"):
        TokenCache(folder)
    part.write_bytes(content)
    lengths = np.fromfile(folder / "part-00000.lengths", "<u4")
    (lengths + (np.arange(len(lengths)) == 0)).astype("<u4").tofile(folder / "part-00000.lengths")
    with pytest.raises(DataError, match="do not add up"):
        TokenCache(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"no manifest that can be read"):
        TokenCache(folder)


# ---- several jobs, killed jobs, full disks ------------------------------------------------------------------------

DRIVER = """
import os, shutil, signal, sys, time
from pathlib import Path
from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache import part as token_parts
from lbr_dist.storage import whole_folder
from lbr_dist.errors import LbrError

real = token_parts.write_part

def before(action):
    def write_part(unit, *arguments):
        action(unit)
        return real(unit, *arguments)
    build_tokens.write_part = write_part

def write_tokenizer(folder, to, max_characters):
    # as the real one, without the seconds that transformers takes
    shutil.copy(folder / "tokenizer.json", to)
    return token_parts.TokenRules("<u2", max_characters, False)

def slow(unit):
    time.sleep(0.02)

def killed(unit):
    if unit.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)

def lockless(*arguments):
    raise OSError(whole_folder.errno.ENOLCK, "No locks available")

if __name__ == "__main__":
    corpus, tokenizer, cache, processes, *modes = sys.argv[1:]
    build_tokens._UNIT, build_tokens._SMALL = 3000, 0
    build_tokens._write_tokenizer = write_tokenizer
    for action in (slow, killed):
        if action.__name__ in modes:
            before(action)
    if "lockless" in modes:
        whole_folder.fcntl.flock = lockless
    try:
        made = build_tokens.build(Path(corpus), Path(tokenizer), Path(cache), int(processes), print)
    except LbrError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(made.folder)
"""


@pytest.fixture
def start(tmp_path: Path, tokenizer: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a build in a process of its own, in a process group of its own."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    started = []

    def driver(corpus: Path, cache: Path, processes: int, *modes: str, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", str(script), str(corpus), str(tokenizer), str(cache), str(processes), *modes]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(lbr_dist.__file__).parents[1])},
            **more,
        )
        started.append(process)
        return process

    yield driver
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "hashes")


@pytest.mark.parametrize("lockless", [False, True])
def test_two_jobs_at_once_make_one_cache(
    corpus: Path, tokenizer: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]], lockless: bool
) -> None:
    modes = ["slow", *(["lockless"] if lockless else [])]
    jobs = [start(corpus, tmp_path / "cache", 1, *modes) for _ in range(2)]
    said = [job.communicate(timeout=60)[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert left_in(tmp_path / "cache") == [Path(said[0][-1]).name]
    assert list(TokenCache(Path(said[0][-1]))) == expected(tokenizer)
    worked = sum(any("tokenising" in line for line in lines) for lines in said)
    waited = sum(any("waiting for another job" in line for line in lines) for lines in said)
    second = sum(any("another job made the same cache" in line for line in lines) for lines in said)
    assert (worked, waited, second) == ((2, 0, 1) if lockless else (1, 1, 0))


def test_a_killed_build_is_never_used_and_is_cleared_away(
    corpus: Path, tokenizer: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    job = start(corpus, tmp_path / "cache", 1, "killed")
    job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL
    (building,) = (tmp_path / "cache").glob(".*.building")
    assert (building / "part-00002.tokens").stat().st_size
    mine = whole_folder.building_folder(tmp_path / "cache" / ("0" * 32))
    elsewhere = tmp_path / "cache" / ".00000000000000000000000000000000.other-1.4999999.00000000.building"
    for folder in (mine, elsewhere):
        folder.mkdir()  # of this process, and of one on another host that has no like here
    cache = made(corpus, tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert left_in(tmp_path / "cache") == sorted([elsewhere.name, mine.name, cache.folder.name])


@pytest.mark.usefixtures("small_units")
def test_a_build_that_was_cut_off_goes_on(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(corpus, tokenizer, tmp_path / "whole").folder
    cache, real = tmp_path / "cache", token_parts.write_part
    building = cut_off(corpus, tokenizer, cache, monkeypatch, 5)
    kept = {number: (building / f"part-{number:05d}.tokens").stat().st_ino for number in (0, 4)}
    (building / "part-00001.lengths").write_bytes(b"")  # as after a loss of power
    (building / "done" / "00002.json").write_text("{")
    (building / ".part-00005.tokens.abcd").write_bytes(b"cut off")
    written: list[int] = []
    monkeypatch.setattr(
        build_tokens, "write_part", lambda unit, *more: written.append(unit.number) or real(unit, *more)
    )
    said: list[str] = []
    found = made(corpus, tokenizer, cache, say=said.append).folder
    count = len(list(whole.glob("*.tokens")))
    assert written == [1, 2, *range(5, count)] and "are there from an earlier build" in said[0]
    assert all((found / f"part-{number:05d}.tokens").stat().st_ino == inode for number, inode in kept.items())
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, found)]
    assert contents[0] == contents[1]
    assert left_in(cache) == [found.name]


@pytest.mark.usefixtures("small_units")
def test_parts_of_another_plan_are_made_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other parts, another name for the corpus (it is in messages), or a file that was written to since."""

    def cut() -> None:
        monkeypatch.setattr(build_tokens, "_UNIT", 5000)
        monkeypatch.setattr(build_tokens, "write_part", token_parts.write_part)
        cut_off(corpus, tokenizer, tmp_path / "cache", monkeypatch, 5)

    def made_again() -> bool:
        said: list[str] = []
        cache = made(corpus, tokenizer, tmp_path / "cache", say=said.append)
        assert list(cache) == expected(tokenizer)
        cache.verify()
        for path in cache.folder.iterdir():
            path.unlink()
        cache.folder.rmdir()
        return "are there from an earlier build" not in said[0]

    cut()
    assert not made_again()
    cut()
    monkeypatch.setattr(build_tokens, "_UNIT", 6000)
    assert made_again()
    cut()
    os.utime(corpus)
    assert made_again()
    cut()
    corpus = corpus.rename(corpus.with_name("renamed.jsonl"))
    assert made_again()


@pytest.mark.usefixtures("small_units")
def test_a_folder_where_another_host_seems_to_work_is_left_alone(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems keep a lock to the host that took it."""
    building = cut_off(corpus, tokenizer, tmp_path / "cache", monkeypatch, 5)
    (building / "done" / "host").write_text("elsewhere-1")
    before = sorted(path.name for path in building.iterdir())
    cache = made(corpus, tokenizer, tmp_path / "cache")
    assert list(cache) == expected(tokenizer)
    assert sorted(path.name for path in building.iterdir()) == before
    shutil.rmtree(cache.folder)
    for path in (building, *building.iterdir()):
        os.utime(path, (time.time() - 100,) * 2)
    said: list[str] = []
    made(corpus, tokenizer, tmp_path / "cache", say=said.append)
    assert "are there from an earlier build" in said[0] and not building.exists()


def cut_off(corpus: Path, tokenizer: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> Path:
    """Build until some parts are finished. Returns the folder in which they are."""
    real = token_parts.write_part

    def write_part(unit: token_parts.Unit, *arguments: Any) -> Any:
        if unit.number == parts:
            raise KeyboardInterrupt
        return real(unit, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build_tokens, "write_part", write_part)
        with pytest.raises(KeyboardInterrupt):
            made(corpus, tokenizer, cache)
    (building,) = cache.glob(".*.building")
    return building


def test_processes_end_with_their_parent(
    tokenizer: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    corpus = jsonl(tmp_path / "large.jsonl", ROWS * 300)
    job = start(corpus, tmp_path / "cache", 2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/.*.building/part-00004.tokens")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
    job.wait()
    while process_group(job.pid):
        assert time.monotonic() < deadline, "processes that tokenise outlived their parent"
        time.sleep(0.05)


def process_group(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_killed_process_is_named(tokenizer: Path, tmp_path: Path, small_units: None) -> None:
    corpus = jsonl(tmp_path / "large.jsonl", ROWS * 300)
    before = set(children())

    def kill_one(text: str) -> None:
        while "tokenising" in text and not (new := set(children()) - before):
            time.sleep(0.01)
        if "tokenising" in text:
            os.kill(max(new), signal.SIGKILL)

    # the processes are started after this line is said
    with pytest.raises(LaunchError, match="was killed, often for want of memory"):
        made(
            corpus, tokenizer, tmp_path / "cache", 2, say=lambda t: threading.Thread(target=kill_one, args=(t,)).start()
        )
    # what is finished is good: the next build goes on with it
    (building,) = (tmp_path / "cache").glob(".*.building")
    assert left_in(tmp_path / "cache") == [building.name]
    finished = len(list(building.glob("done/0*.json")))
    said: list[str] = []
    made(corpus, tokenizer, tmp_path / "cache", 2, say=said.append).verify()
    assert ("are there from an earlier build" in said[0]) == (finished > 0)


def children() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split() if b"spawn_main" in command(int(child))]


def command(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_named_and_nothing_is_left(
    tokenizer: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]], processes: int
) -> None:
    """A real failed write: no file may grow larger than the tokenizer's, and a part would."""
    size = (tokenizer / "tokenizer.json").stat().st_size + 100

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    corpus = jsonl(tmp_path / "corpus.jsonl", [{"text": " ".join(row["text"] for row in ROWS)}] * 20)
    job = start(corpus, tmp_path / "cache", processes, preexec_fn=limit)
    error = job.communicate(timeout=60)[1]
    assert error.startswith(f"DataError: {tmp_path / 'cache'}: no room for the token cache of {corpus}"), error
    assert "File too large" in error and "MB free, expected about 0." in error and "Free some space" in error
    assert left_in(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_written_is_named(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*Not a directory.*another folder"):
        made(corpus, tokenizer, tmp_path / "file" / "cache")


def test_a_span_of_a_large_file_begins_where_it_should(tmp_path: Path) -> None:
    """Lines are counted from the file's first, however far into it a part begins."""
    path = jsonl(tmp_path / "lines.jsonl", [{"n": i, "x": "x" * 200} for i in range(20_000)])
    size = path.stat().st_size
    place, row = next(iter(span_rows(Span(path, size // 2, size))))
    assert row is not None and str(place) == f"{path}:{row['n'] + 1}"


def test_what_is_discarded_takes_no_more_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is removed, another rank writes one: it would keep the folder from going."""
    building = tmp_path / ".key.building"
    (building / "done").mkdir(parents=True)
    remove = whole_folder.shutil.rmtree

    def meanwhile(path: Path, ignore_errors: bool) -> None:
        with pytest.raises(FileNotFoundError):
            (building / "done" / "part.json").write_text("{}")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(whole_folder.shutil, "rmtree", meanwhile)
    whole_folder.discard(building)
    assert not list(tmp_path.iterdir())
    whole_folder.discard(building)  # another rank was first
