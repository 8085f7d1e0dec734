"""The option `--columns`, and model folders that are not there: refused before a library is loaded or a file read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lbr_dist.errors import ConfigError
from lbr_dist.launch.commands.columns import add_columns, columns_of
from tests.unit.launch.cases import message


def _parsed(*words: str) -> dict[str, str] | None:
    parser = argparse.ArgumentParser()
    add_columns(parser)
    return columns_of(parser.parse_args(list(words)))


def test_columns_are_named_one_by_one() -> None:
    assert _parsed() is None
    assert _parsed("--columns", "text=the abstract, in = full", "--columns", "id=pmid") == {
        "text": "the abstract, in = full",
        "id": "pmid",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("text",), "--columns: found 'text', expected OURS=THEIRS"),
        (("text=a", "text=b"), "found 'text=b', expected .* at most once"),
        (("texts=a",), "--columns: found 'texts', expected one of our names: id, title, text, query"),
        (("text=",), "--columns: text: found '', expected the name of a column"),
        (("text=a", "title=a"), "--columns: text: found 'a', expected .* at most once"),
    ],
)
def test_columns_that_are_no_mapping(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _parsed(*(part for word in words for part in ("--columns", word)))


DATA = ("--pairs", "p", "--documents", "d", "--out")
MISSPELT = {
    "encode": (("encode", "no/such/modle", "corpus.jsonl", "--out", "v.npy"), "model"),
    "evaluate": (("evaluate", "no/such/modle", *DATA, "o"), "model"),
    "beside": (("evaluate", ".", "--beside", "b=no/such/modle", *DATA, "o"), "--beside b"),
    "negatives": (("data", "negatives", "--model", "no/such/modle", *DATA, "o.jsonl"), "--model"),
    "tokens": (("data", "tokens", "--base", "no/such/modle", "--corpus", "c"), "--base"),
    "vocab": (("data", "vocab", "--base", "no/such/modle", "--corpus", "c", "--out", "o"), "--base"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_model_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, field = MISSPELT[name]
    said = message(capsys, *command)
    assert said.startswith(f"error: {field}: found 'no/such/modle', which is not a folder: no such folder.")
    assert not list(tmp_path.iterdir())
