"""Encoding in parts: existing parts are not made again, and parts of something else are refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lbr_dist.encode import collection
from lbr_dist.encode.collection import EncodeJob, encode_collection
from lbr_dist.encode.encoder import Encoder
from lbr_dist.errors import ConfigError, DataError, LaunchError
from lbr_dist.launch import cli
from lbr_dist.ranks.group import Ranks
from tests import tiny

ALONE = Ranks.alone()


@pytest.fixture
def job(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> EncodeJob:
    torch.set_num_threads(1)  # tests of other modules may have left another number
    collection = tmp_path / "collection.jsonl"
    shutil.copy(tiny_data / "corpus.jsonl", collection)
    return EncodeJob(tiny_model, collection, tmp_path / "out" / "vectors.npy", part_texts=10)


def encode(job: EncodeJob) -> list[str]:
    said: list[str] = []
    encode_collection(job, ALONE, said.append)
    return said


def cut_off(job: EncodeJob, monkeypatch: pytest.MonkeyPatch, parts: int = 3) -> None:
    """Encode until some parts are written."""
    real, written = collection._write_part, 0

    def write(*arguments: Any) -> None:
        nonlocal written
        if written == parts:
            raise KeyboardInterrupt
        written += 1
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(collection, "_write_part", write)
        with pytest.raises(KeyboardInterrupt):
            encode(job)
    assert len(list(job.folder.glob("part-*.npy"))) == parts and not job.out.exists()


def test_the_vectors_equal_the_encoders_in_the_order_of_the_file(job: EncodeJob) -> None:
    assert encode(job) == [f"written to {job.out}: 96 vectors"]
    found = np.load(job.out)
    expected = Encoder(job.model, chunk_tokens=job.chunk_tokens).encode(list(tiny.texts().values()), "document")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
    assert job.out.with_suffix(".ids").read_text().splitlines() == list(tiny.texts())
    table = replace(job, out=job.out.with_suffix(".parquet"))
    encode(table)
    rows = pq.read_table(table.out)
    assert rows["id"].to_pylist() == list(tiny.texts())
    assert np.array_equal(np.array(rows["embedding"].to_pylist(), np.float32), found)
    assert sorted(path.name for path in job.out.parent.iterdir()) == ["vectors.ids", "vectors.npy", "vectors.parquet"]


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_an_interrupted_job_resumes(job: EncodeJob, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    job = replace(job, out=job.out.with_suffix(ending))
    encode(job)
    whole = job.out.read_bytes()
    job.out.unlink()
    cut_off(job, monkeypatch)
    kept = job.part(0).stat().st_ino
    for damaged, content in ((1, b""), (2, job.part(2).read_bytes()[:-7])):
        job.part(damaged).write_bytes(content)
    (job.folder / ".part-00004.npy.abcd").write_bytes(b"cut off")
    made: list[int] = []
    real = collection._write_part

    def write(path: Path, vectors: Any) -> None:
        assert not list(job.folder.glob(".part-*")) and job.part(0).stat().st_ino == kept
        made.append(int(path.stem[5:]))
        real(path, vectors)

    monkeypatch.setattr(collection, "_write_part", write)
    assert encode(job)[0] == f"{job.folder}: 1 of 10 parts exist already"
    assert made == list(range(1, 10))
    assert job.out.read_bytes() == whole and not job.folder.exists()


def test_a_job_that_was_interrupted_while_it_cleaned_up_starts_over(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(job)
    whole = job.out.read_bytes()
    cut_off_out = replace(job, out=job.out.with_name("again.npy"))
    cut_off(cut_off_out, monkeypatch)
    (cut_off_out.folder / collection.MANIFEST).unlink()
    assert encode(cut_off_out) == [f"written to {cut_off_out.out}: 96 vectors"]
    assert cut_off_out.out.read_bytes() == whole and not cut_off_out.folder.exists()


def test_parts_of_something_else_are_refused(
    job: EncodeJob, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(job, monkeypatch)
    other_model = tmp_path / "other"
    shutil.copytree(tiny_model, other_model)
    weights = other_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for other, differs in (
        (replace(job, kind="query"), "--kind"),
        (replace(job, part_texts=11, chunk_tokens=99), "--chunk-tokens, --part-texts"),
        (replace(job, threads=2), "--threads"),
        (replace(job, model=other_model), "the model"),
    ):
        with pytest.raises(DataError, match=f"found parts that differ in {differs}, expected .* name another --out"):
            encode(other)
    torch.set_num_threads(1)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    content = job.collection.read_text()
    job.collection.write_text(content.replace("large", "vast"))
    with pytest.raises(DataError, match="differ in the collection, expected"):
        encode(job)
    job.collection.write_text(content)
    assert "3 of 10 parts exist" in encode(replace(job, model=moved))[0]  # the same content, elsewhere


def test_a_second_job_is_refused_and_leaves_the_first_alone(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(job, monkeypatch)
    with collection._owned(job), pytest.raises(LaunchError, match=r"another job encodes into .*vectors\.npy"):
        encode(job)
    assert "3 of 10 parts exist" in encode(job)[0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "d0", "text": "x"}, r"collection\.jsonl:97: found document id 'd0' again"),
        ({"id": "x", "text": " "}, r"collection\.jsonl:97: found text = ' '"),
        ({"id": "a\n", "text": "x"}, r"collection\.jsonl:97: found the id 'a\\n', expected one line"),
        ({"id": "x", "text": "half \ud83d"}, r"collection\.jsonl:97: found half of a surrogate pair"),
    ],
)
def test_a_bad_collection_is_refused_before_anything_is_encoded(
    job: EncodeJob, row: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "open_encoder", lambda *_: pytest.fail("a model was loaded"))
    with job.collection.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=says):
        encode(job)
    assert not job.folder.exists()
    with pytest.raises(DataError, match=r"'.txt', expected .npy or .parquet"):
        encode(replace(job, out=job.out.with_suffix(".txt")))
    with pytest.raises(ConfigError, match="--part-texts: found 0"):
        replace(job, part_texts=0)


def test_a_collection_that_changes_while_it_is_read_is_refused(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    real = collection._write_part

    def write(path: Path, vectors: Any) -> None:
        real(path, vectors)
        os.utime(job.collection)

    monkeypatch.setattr(collection, "_write_part", write)
    with pytest.raises(DataError, match="it was changed while it was read"):
        encode(job)
    assert not job.out.exists()


def test_a_full_disk_is_reported_and_finished_parts_are_kept(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import signal

    cut_off(job, monkeypatch)
    size = job.part(0).stat().st_size * 5  # enough for every part, but not for the joined file
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(DataError, match=r"no room for the vectors \(File too large\).*finished parts are kept"):
            encode(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in job.out.parent.iterdir()] == [job.folder.name]
    assert "10 of 10 parts exist" in encode(job)[0] and len(np.load(job.out)) == 96


def test_the_command(job: EncodeJob, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["encode", str(job.model), str(job.collection), "--out", str(job.out), "--part-texts", "10"]
    assert cli.main(arguments) == 0
    assert f"written to {job.out}: 96 vectors" in capsys.readouterr().out
    assert cli.main([*arguments[:-1], "0"]) == 1
    assert "--part-texts: found 0, expected one or more" in capsys.readouterr().err


def test_existing_parts_set_the_number_of_threads(job: EncodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with one thread and resumed by a process that would use two: the existing parts decide."""
    assert job.threads is None
    torch.set_num_threads(1)
    try:
        cut_off(job, monkeypatch)
        torch.set_num_threads(2)
        encode(job)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_texts_and_their_names_are_what_a_folder_of_them_is_encoded_from(
    job: EncodeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, text in list(tiny.texts().items())[:40]:
        (folder / f"my {name}.txt").write_text(text)
    job = replace(job, collection=folder)
    cut_off(job, monkeypatch)
    moved = (folder / "my d39.txt").rename(folder / "my d390.txt")  # same bytes, same order, another id
    with pytest.raises(DataError, match="differ in the collection, expected"):
        encode(job)
    moved.rename(folder / "my d39.txt")
    assert encode(job)[0].endswith("3 of 4 parts exist already")
    names = job.out.with_suffix(".ids").read_text().splitlines()
    assert names == sorted(path.name for path in folder.iterdir()) and len(names) == 40
