"""The token cache: the same tokens from every format and number of processes, and complete or absent."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache import part as token_parts
from lbr_dist.data.token_cache.cache import TokenCache
from lbr_dist.errors import DataError, LaunchError
from lbr_dist.storage import fingerprint
from tests.unit.data.token_cache.cases import ROWS, expected, jsonl, left_in, made


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


def test_a_corpus_of_only_bad_documents_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no documents to learn from; left out: 2 empty \(the first: .*corpus\.jsonl:1\)"
    ):
        made(jsonl(tmp_path / "corpus.jsonl", [{"text": ""}, {"text": " "}]), tokenizer, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_an_existing_cache_is_used_unless_its_inputs_changed(
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
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same inode, same write time
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


def test_a_corpus_that_changes_during_the_build_is_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = token_parts.write_part

    def write_part(*arguments: Any) -> Any:
        part = real(*arguments)
        with corpus.open("a") as file:
            file.write('{"text": "late"}\n')
        return part

    monkeypatch.setattr(build_tokens, "write_part", write_part)
    with pytest.raises(DataError, match=r"corpus\.jsonl: changed while it was being read"):
        made(corpus, tokenizer, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


# ---- several jobs, killed jobs, full disks ------------------------------------------------------------------------


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
        assert time.monotonic() < deadline, "tokenising processes outlived their parent"
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

    # the processes start after this line is reported
    with pytest.raises(LaunchError, match="was killed, often for lack of memory"):
        made(
            corpus, tokenizer, tmp_path / "cache", 2, say=lambda t: threading.Thread(target=kill_one, args=(t,)).start()
        )
    # finished parts are valid: the next build keeps them
    (building,) = (tmp_path / "cache").glob(".*.building")
    assert left_in(tmp_path / "cache") == [building.name]
    finished = len(list(building.glob("done/0*.json")))
    said: list[str] = []
    made(corpus, tokenizer, tmp_path / "cache", 2, say=said.append).verify()
    assert ("already done by an earlier build" in said[0]) == (finished > 0)


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
    """A write that really fails: no file may grow larger than the tokenizer's, but a part would."""
    size = (tokenizer / "tokenizer.json").stat().st_size + 100

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    corpus = jsonl(tmp_path / "corpus.jsonl", [{"text": " ".join(row["text"] for row in ROWS)}] * 20)
    job = start(corpus, tmp_path / "cache", processes, preexec_fn=limit)
    error = job.communicate(timeout=60)[1]
    assert error.startswith(f"DataError: {tmp_path / 'cache'}: no room for the token cache of {corpus}"), error
    assert "File too large" in error and " free, expected about " in error and "Free some space" in error
    assert left_in(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_written_is_named(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*Not a directory.*another folder"):
        made(corpus, tokenizer, tmp_path / "file" / "cache")
