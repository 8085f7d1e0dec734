"""What `lbr data negatives` refuses, before it loads a model or starts a rank."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_dist.launch import cli
from tests.unit.mining.cases import write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


MODEL = ("--model", "MODEL")

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), r"--model: found none, expected a model folder, or --with bm25"),
    "model asked for": (("--with", "model"), r"--model: found None, expected a model folder"),
    "no such model": (("--model", "nowhere"), r"--model: found 'nowhere', which is not a folder"),
    "no model folder": (("--model", "."), r"--model: \. has no config.json"),
    "no pairs": ((*MODEL, "--pairs", "nowhere.jsonl"), r"nowhere.jsonl: no such file or folder"),
    "no documents": ((*MODEL, "--documents", "nowhere.jsonl"), r"nowhere.jsonl: no such file or folder"),
    "first after last": (
        (*MODEL, "--first", "9", "--last", "8"),
        r"--first: found 9, expected at most --last, which is 8",
    ),
    "narrow window": ((*MODEL, "--last", "7"), r"--negatives: found 8, expected at most 7 \(--first to --last\)"),
    "first": ((*MODEL, "--first", "0"), r"--first: found 0, expected one or more"),
    "negatives": ((*MODEL, "--negatives", "0"), r"--negatives: found 0, expected one or more"),
    "both margins": (
        (*MODEL, "--margin-percent", "0.9", "--margin-absolute", "0.1"),
        r"--margin-absolute: found 0.1, expected no --margin-percent with it",
    ),
    "percent": ((*MODEL, "--margin-percent", "1.5"), r"--margin-percent: found 1.5, expected above 0 and at most 1"),
    "zero percent": ((*MODEL, "--margin-percent", "0"), r"--margin-percent: found 0.0, expected above 0"),
    "absolute": ((*MODEL, "--margin-absolute", "-1"), r"--margin-absolute: found -1.0, expected 0 or more"),
    "ivf of bm25": (("--with", "bm25", "--index", "ivf"), r"--index: found ivf, expected exact with --with bm25"),
    "out is no .jsonl": ((*MODEL, "--out", "mined.csv"), r"--out: found 'mined.csv', expected .* ends in .jsonl"),
    "out is the pairs": ((*MODEL, "--out", "./train.jsonl"), r"--out: found 'train.jsonl', which is --pairs"),
    "out below a file": ((*MODEL, "--out", "train.jsonl/x.jsonl"), r"--out: found .* is not a writable folder"),
    "out cannot be made": ((*MODEL, "--out", "/proc/x/y.jsonl"), r"/proc/x"),
    "ranks": ((*MODEL, "--ranks", "1000"), r"--ranks: found 1000, this machine has \d+ cores"),
    "no ranks": ((*MODEL, "--ranks", "0"), r"--ranks: found 0, expected one or more"),
    "no candidates": ((*MODEL, "--first", "96"), r"corpus.jsonl: found 95 candidates .* expected at least 96"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str, data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setattr("lbr_dist.launch.local_ranks.run_stage", lambda *_: pytest.fail("a rank was started"))
    given, expected = MISTAKES[name]
    arguments = ["data", "negatives", "--pairs", "train.jsonl", "--documents", "corpus.jsonl", "--out", "mined.jsonl"]
    if name == "no candidates":
        given = (*given, "--last", "200")
    assert cli.main([*arguments, *(str(tiny_model) if each == "MODEL" else each for each in given)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and re.search(expected, captured.err)
    assert not Path("mined.jsonl").exists() and not Path("mined.jsonl.work").exists()


def test_a_mistake_is_reported_without_torch(data: Path) -> None:
    code = (
        "import sys; from lbr_dist.launch import cli\n"
        "assert cli.main(sys.argv[1:]) == 1\n"
        "heavy = {'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    given = [
        "data",
        "negatives",
        "--pairs",
        "x.jsonl",
        "--documents",
        "corpus.jsonl",
        "--out",
        "o.jsonl",
        "--with",
        "bm25",
    ]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False, cwd=data)
    assert done.returncode == 0 and "error: x.jsonl: no such file" in done.stderr
