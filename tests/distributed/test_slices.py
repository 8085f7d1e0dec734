"""Encoding and tokenising, split over 1 to 4 ranks: the files equal those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from lbr_dist.data.token_cache import build as build_tokens
from lbr_dist.encode import collection
from lbr_dist.encode.collection import EncodeJob, encode_collection
from lbr_dist.ranks.group import Ranks
from tests import tiny
from tests.ranks import RankPool


def encode_on(ranks: Ranks, job: EncodeJob) -> tuple[list[str], int]:
    """The printed lines, and how many parts this rank made."""
    said: list[str] = []
    with patch.object(collection, "_write_part", wraps=collection._write_part) as write:
        encode_collection(job, ranks, said.append)
    return said, write.call_count


def tokens_on(ranks: Ranks | None, corpus: Path, tokenizer: Path, cache: Path) -> tuple[Path, list[str], int]:
    """The cache, the printed lines, and how many parts this rank made."""
    said: list[str] = []
    with (
        patch.object(build_tokens, "_UNIT", 3000),
        patch.object(build_tokens, "_SMALL", 0),
        patch.object(build_tokens, "write_part", wraps=build_tokens.write_part) as write,
    ):
        folder = build_tokens.build(corpus, tokenizer, cache, 1, said.append, ranks=ranks).folder
    return folder, said, write.call_count


def assert_shared(counts: list[int], total: int) -> None:
    assert sum(counts) == total and max(counts) - min(counts) <= 1, counts


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_encoding_is_the_same_on_any_number_of_ranks(
    pool: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path, ending: str
) -> None:
    collection = tiny_data / "corpus.jsonl"
    one, more = (tmp_path / f"{name}.{ending}" for name in ("one", "more"))
    jobs = [EncodeJob(tiny_model, collection, out, part_texts=7, threads=1) for out in (one, more)]
    encode_on(Ranks.alone(), jobs[0])
    found = pool.run(encode_on, job=jobs[1])
    by = f", by {pool.world_size} ranks" if pool.world_size > 1 else ""
    assert [said for said, _ in found] == [[f"written to {jobs[1].out}: 96 vectors{by}"]] + [[]] * (pool.world_size - 1)
    assert_shared([count for _, count in found], 14)
    assert jobs[1].out.read_bytes() == jobs[0].out.read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_fewer_parts_than_ranks(two_ranks: RankPool, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    job = EncodeJob(tiny_model, tiny_data / "corpus.jsonl", tmp_path / "v.npy")
    two_ranks.run(encode_on, job=job)
    assert len((tmp_path / "v.ids").read_text().splitlines()) == 96


def test_the_token_cache_is_the_same_on_any_number_of_ranks(pool: RankPool, tiny_model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": text} for text in tiny.texts().values()] + [{"text": ""}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    alone, _, parts = tokens_on(None, corpus, tiny_model, tmp_path / "alone")
    found = pool.run(tokens_on, corpus=corpus, tokenizer=tiny_model, cache=tmp_path / "cache")
    assert {folder for folder, _, _ in found} == {tmp_path / "cache" / alone.name}
    assert_shared([count for _, _, count in found], parts)
    contents = [{path.name: path.read_bytes() for path in f.iterdir()} for f in (alone, found[0][0])]
    assert contents[0] == contents[1] and len(contents[0]) > 10
    # an existing cache is used
    again = pool.run(tokens_on, corpus=corpus, tokenizer=tiny_model, cache=tmp_path / "cache")
    assert all((folder, len(said), count) == (found[0][0], 1, 0) for folder, said, count in again)
