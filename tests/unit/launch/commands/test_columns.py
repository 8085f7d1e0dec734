"""The option `--columns`, and model folders that are not there: refused before a library is loaded or a file read."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from lbr_dist.data.token_cache.build import token_cache
from lbr_dist.errors import ConfigError
from lbr_dist.launch import cli
from lbr_dist.launch.commands.columns import add_columns, columns_of
from tests.configs import tiny_run
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


def test_tokens_of_mapped_columns_are_those_that_a_run_reads(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Slurm job names the columns on its command line."""
    (tmp_path / "corpus.jsonl").write_text('{"abstract": "a pale eye", "text": "nothing"}\n')
    config = tiny_run(tmp_path / "run", tiny_model, tmp_path)
    data = replace(config.data, cache_dir=str(tmp_path), columns={"text": "abstract"})
    words = ("--base", str(tiny_model), "--corpus", data.corpus, "--cache-dir", data.cache_dir)
    assert cli.main(["data", "tokens", *words, "--columns", "text=abstract"]) == 0
    made = {path for path in tmp_path.iterdir() if (path / "manifest.json").exists()}
    assert {token_cache(replace(config, data=data), 1, lambda text: None).folder} == made
    assert "1 documents" in capsys.readouterr().out
