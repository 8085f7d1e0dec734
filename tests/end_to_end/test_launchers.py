"""Launchers other than ours: real mpirun and deepspeed, and what happens to their ranks when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.data.token_cache.cache import TokenCache
from lbr_dist.encode.collection import EncodeJob, encode_collection
from lbr_dist.ranks.group import Ranks
from tests import tiny
from tests.end_to_end.runs import config_file, lbr

ALONE = Ranks.alone()
SECONDS_TO_END = 90
"""Half a minute where nothing else runs; a rank that waited for the lost one would take the ten of its time limit."""


def mpirun(ranks: int) -> tuple[str, ...]:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed; apt-get install openmpi-bin")
    return ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, "-m")


def on_ranks(ranks: int, fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under mpirun, in small parts; see `with_fault`."""
    command = [*mpirun(ranks), "tests.end_to_end.with_fault", fault, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def living(word: str) -> list[int]:
    """Other processes on this machine that have a word on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def assert_no_orphans(word: str) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while left := living(word):
        assert time.monotonic() < deadline, f"ranks outlived mpirun: {left}"
        time.sleep(0.1)


def test_an_error_in_one_rank_ends_the_others(tmp_path: Path) -> None:
    """With MPI's own exit, the rank that failed would wait for the others."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from lbr_dist.ranks.rendezvous import here\n"
        "place = here()\n"
        "print(place, flush=True)\n"
        "if place.rank == 1:\n"
        "    sys.exit('error: the fault')\n"
        "time.sleep(300)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WORLD_SIZE": "2"}
    command = [*mpirun(2)[:-1], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_END, env=environment, check=False)
    assert done.returncode == 1 and "error: the fault" in done.stderr
    for rank in (0, 1):
        place = f"Placement(rank={rank}, world_size=2, local_rank={rank}, local_world_size=2, url='tcp://127.0.0.1:"
        assert place in done.stdout
    assert_no_orphans(str(script))
    # a variable left over from another launch
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_END,
        env=environment | {"WORLD_SIZE": "8"},
        check=False,
    )
    assert done.returncode == 1
    assert "WORLD_SIZE: found 8 in the environment, but mpirun started this process as rank" in done.stderr


# ---- training -----------------------------------------------------------------------------------------------------


def test_mpirun_gives_the_same_model(
    finished: tuple[Path, Path, str], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    done = lbr("learn", str(config_file(tmp_path, tiny_model, tiny_data)), launcher=mpirun(2))
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = finished[1], tmp_path / "a run"
    name = "learn/export/model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.slow
def test_the_deepspeed_launcher_gives_the_same_model(
    finished: tuple[Path, Path, str], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """It puts `--local_rank=N` before the command's own arguments."""
    start = "import sys; from deepspeed.launcher.runner import main; sys.exit(main())"
    launcher = (sys.executable, "-c", start, "--num_gpus", "2", "--master_port", "29731", "--module")
    done = lbr("learn", str(config_file(tmp_path, tiny_model, tiny_data)), launcher=launcher, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'--local_rank=1', 'learn'" in done.stdout + done.stderr
    ours, theirs = finished[1], tmp_path / "a run"
    name = "learn/export/model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()


# ---- encoding -----------------------------------------------------------------------------------------------------


def test_encode_over_mpi_resumes_after_a_killed_rank(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    collection = tiny_data / "corpus.jsonl"
    job = EncodeJob(tiny_model, collection, tmp_path / "one.npy", part_texts=10, threads=1)
    encode_collection(job, ALONE, lambda _: None)
    out = tmp_path / "vectors.npy"
    arguments = ("encode", str(tiny_model), str(collection), "--out", str(out), "--part-texts", "10", "--threads", "1")
    done = on_ranks(2, "1:2", *arguments)
    assert done.returncode != 0 and not out.exists(), done.stdout + done.stderr
    assert "signal 9 (Killed)" in done.stderr
    assert_no_orphans(str(out))
    before = len(list(tmp_path.glob("vectors.npy.parts/part-*.npy")))
    assert 2 <= before < 10
    done = on_ranks(3, "none", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{before} of 10 parts exist already" in done.stdout
    assert out.read_bytes() == (tmp_path / "one.npy").read_bytes()
    assert (tmp_path / "vectors.ids").read_text().splitlines() == list(tiny.texts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.ids", "one.npy", "vectors.ids", "vectors.npy"]


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_tokens_over_mpi_resume_after_a_killed_rank(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": text} for text in tiny.texts().values()] + [{"text": ""}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    monkeypatch.setattr(build_tokens, "_UNIT", 3000)
    alone = build_tokens.build(corpus, tiny_model, tmp_path / "alone", 1, lambda _: None)
    cache = tmp_path / "cache"
    arguments = ("data", "tokens", "--base", str(tiny_model), "--corpus", str(corpus), "--cache-dir", str(cache))
    done = on_ranks(2, "1:1", *arguments)
    assert done.returncode != 0 and "signal 9 (Killed)" in done.stderr, done.stdout + done.stderr
    assert_no_orphans(str(cache))
    (building,) = cache.glob(".*.building")
    finished = {path: path.stat().st_mtime_ns for path in building.glob("done/0*.json")}
    assert len(finished) >= 1
    done = on_ranks(3, "none", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 3 ranks" in done.stdout and "already done by an earlier build" in done.stdout
    (made,) = [path for path in cache.iterdir() if path.is_dir() and path.name != "hashes"]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (alone.folder, made)]
    assert contents[0] == contents[1] and made.name == alone.folder.name
    TokenCache(made).verify()


def test_an_error_in_one_rank_ends_mpirun_with_its_message(tiny_model: Path, tmp_path: Path) -> None:
    """The second rank reads a line that is not JSON, while the first rank waits for it."""
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in tiny.texts().values()]
    corpus.write_text("\n".join([*lines[:50], "{", *lines[50:]]) + "\n")
    cache = tmp_path / "cache"
    began = time.monotonic()
    done = on_ranks(
        2, "none", "data", "tokens", "--base", str(tiny_model), "--corpus", str(corpus), "--cache-dir", str(cache)
    )
    assert done.returncode == 1
    assert f"error: {corpus}:51: found a line that is not JSON" in done.stderr
    assert time.monotonic() - began < SECONDS_TO_END, "mpirun did not end at once"
    assert_no_orphans(str(cache))
    assert not list(cache.glob(".*.building"))
